"""A store below ours that is only read: what an image was baked with, or another store of this machine.

Its complete files are served from where they lie. Nothing in it is ever changed; a file that turns out to be damaged is
fetched anew, into our own store.
"""

import contextlib
import fcntl
import os
from collections import OrderedDict
from pathlib import Path

import lmdb

from modelfs.chunks import ObjectInfo
from modelfs.digests import Verdict
from modelfs.errors import CacheError
from modelfs.store import files
from modelfs.store.index import Index


class Lower:
    """The open lower store.

    Args:
        directory: What ``modelfs get`` filled, or a cache directory that no daemon is using.

    Raises:
        CacheError: There is no store in it.
    """

    def __init__(self, directory: str) -> None:
        found = [path for path in (Path(directory, files.STORE_NAME), Path(directory)) if (path / "index").is_dir()]
        if not found:
            raise CacheError(f"there is no store in {directory}", "fill it with modelfs get, or check --lower-dir")
        self._data = found[0] / "data"
        self._lock = _share(found[0] / "lock")
        try:
            self._index = Index(found[0] / "index", readonly=True)
        except lmdb.Error as error:
            raise CacheError(
                f"the store in {directory} cannot be read ({error})", "fill it again: modelfs get"
            ) from error

    def find(self, info: ObjectInfo) -> tuple[Path, OrderedDict[int, bytes], int, bool, Verdict | None] | None:
        """Return a complete object's data file, checksums, time of change, whether that is as recorded, and verdict."""
        with contextlib.suppress(lmdb.Error, OSError):
            row = self._index.object(info.number)
            if row is None or row.info.id != info.id or row.info.size != info.size or row.resident != info.size:
                return None
            path = files.data_path(self._data, info.number)
            status = path.stat()
            if status.st_size == info.size and os.access(path, os.R_OK):
                sums = OrderedDict(sorted(self._index.chunks(info.number).items()))
                untouched = status.st_mtime_ns == row.stamp
                return path, sums, status.st_mtime_ns, untouched, self._index.verdict(info.number)
        return None

    def close(self) -> None:
        """Close the index, and let others use the store."""
        self._index.close()
        if self._lock >= 0:
            os.close(self._lock)


def _share(path: Path) -> int:
    """Keep daemons that would evict from it out of a store; return the lock's descriptor, -1 where there can be none.

    Raises:
        CacheError: One is using it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1  # a read-only image
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CacheError(
            f"the store in {path.parent} is in use", "stop that mount, or name another --lower-dir"
        ) from None
    return descriptor
