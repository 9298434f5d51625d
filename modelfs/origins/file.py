"""A directory of this machine or of a shared file system.

A version is the time of change, size and inode number, looked at before and after every read. The listing follows
links to files, not to directories. Threads: any.
"""

import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

from modelfs.chunks import ByteRange, ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import Digest
from modelfs.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    TransientOriginError,
)
from modelfs.origins import Count, Sink
from modelfs.origins.retry import RetryingOrigin
from modelfs.source import Source


class FileOrigin(RetryingOrigin):
    """The files of this machine; keys are absolute paths without the first slash."""

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        super().__init__(count)
        # A shared directory has other inode numbers elsewhere, and a cache may be carried there.
        self.name = f"file://{socket.gethostname()}"

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every regular file under the directory; see ``Origin.list``."""
        self._count("requests", "list", 1)
        top = self._path(prefix).rstrip("/") or "/"
        if not os.path.isdir(top):
            raise BucketNotFoundError(f"directory {top} does not exist", "check the source")

        def fail(error: OSError) -> None:
            raise self._translate(error, str(error.filename).lstrip("/"))

        for directory, _, names in os.walk(top, onerror=fail):
            for name in names:
                path = os.path.join(directory, name)  # keys begin with the prefix as it was written
                try:
                    found = os.stat(path)
                except FileNotFoundError:
                    continue  # deleted meanwhile, or a link to nothing
                except OSError as error:
                    raise self._translate(error, path.lstrip("/")) from error
                if stat.S_ISREG(found.st_mode):
                    key = path.removeprefix("/")
                    yield ObjectInfo(ObjectId(self.name, key, _version(found)), found.st_size, found.st_mtime_ns)

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""

        def read(_: object) -> bytes:
            self._count("requests", "get", 1)
            with open(self._path(key), "rb", buffering=0) as file:
                return file.read(limit)

        try:
            return self._persist(read, key)
        except ObjectNotFoundError:
            return None

    def put_small(self, key: str, data: bytes) -> None:
        """Raise: nothing is ever written to a source."""
        raise OriginError(f"{self._where(key)} is not written to", "write to s3://")

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: a file system keeps none."""
        return None

    def _stream(self, client: Any, info: ObjectInfo, span: ByteRange, sink: Sink) -> Iterator[int]:  # noqa: ANN401
        self._count("requests", "get", 1)
        # What has become a pipe meanwhile is not waited for.
        opened = os.open(self._path(info.id.key), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(opened, "rb", buffering=0) as file:
            position = span.start
            while position < span.stop:
                space = sink.space()
                count = os.preadv(file.fileno(), [space[: span.stop - position]], position)
                if _version(os.fstat(file.fileno())) != info.id.version:
                    raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")
                if not count:
                    return
                sink.advance(count)
                self._count("bytes", "", count)
                position += count
                yield count

    def _path(self, key: str) -> str:
        return f"/{key}"

    def _where(self, key: str) -> str:
        return f"file:///{key}"

    def _translate(self, error: Exception, key: str) -> OriginError:
        if isinstance(error, OriginError):
            return error
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return ObjectNotFoundError(f"{self._where(key)} does not exist any more", "check the directory")
        if isinstance(error, PermissionError):
            return AccessDeniedError(f"{self._where(key)} may not be read", "check its mode and the daemon's user")
        if isinstance(error, OSError):
            return TransientOriginError(f"reading {self._where(key)} failed ({error.strerror})")
        raise error


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
