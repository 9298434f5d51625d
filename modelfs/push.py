"""The way into the bucket: files of a directory, an archive or another place, complete for readers or not at all.

While files are being written, an object ``MARKER`` lies beside them, and mounts do not show that directory (see
``sources``); ``SHA256SUMS`` is written when all the others are there, then the marker goes. A push that was killed is
run again: what has arrived is left as it is.
"""

import hashlib
import json
import lzma
import os
import stat
import tarfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from modelfs.chunks import MIB, Step
from modelfs.errors import ConfigError, OriginError
from modelfs.origins.s3_target import S3Target
from modelfs.sources import MARKER
from modelfs.store.files import STORE_NAME

SUMS_NAME = "SHA256SUMS"
FILES_AT_ONCE, PARTS_AT_ONCE, HASHERS = 3, 8, 4
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_POLL_SECONDS = 0.1
_BLOCK_BYTES = 4 * MIB

Show = Callable[[str, Step], None]
"""Takes what is going on, and how far it has come."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a push did.

    ``sent_files`` and ``sent_bytes`` went over the network; ``removed_files`` were in the bucket and not in the source.
    """

    files: int
    size_bytes: int
    sent_files: int = 0
    sent_bytes: int = 0
    removed_files: int = 0


class _Count:
    """Bytes, counted by several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.value = 0
        self.stopped = False

    def add(self, count: int) -> None:
        with self._lock:
            self.value += count


def files_of(directory: Path) -> dict[str, Path]:
    """Return the regular files below a directory, by their relative names; links are followed.

    Raises:
        ConfigError: There is none, or one cannot be read.
    """
    found: dict[str, Path] = {}
    for top, directories, names in os.walk(directory, followlinks=True, onerror=_unreadable):
        directories[:] = [name for name in directories if name not in {STORE_NAME, ".git"}]
        for name in names:
            path = Path(top, name)
            relative = path.relative_to(directory).as_posix()
            try:
                if relative == SUMS_NAME or name == MARKER or not stat.S_ISREG(path.stat().st_mode):
                    continue
            except OSError as error:
                _unreadable(error)
            _check_name(relative)
            found[relative] = path
    return found


def _unreadable(error: OSError) -> NoReturn:
    raise ConfigError(f"{error.filename} cannot be read ({error.strerror})", "remove or mend it") from error


def _check_name(relative: str) -> None:
    """Raise if a name cannot be an object's, or would be another one's in a list of sums."""
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{relative!r} is no text", "rename it: object keys are UTF-8") from None
    if relative != relative.strip() or relative.startswith("*") or len(relative.splitlines()) != 1:
        raise ConfigError(f"{relative!r} cannot stand in {SUMS_NAME}", "rename it")


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar archive; nothing in it can lead out of ``target``, and no device is made.

    Raises:
        ConfigError: It is no archive, or a hostile one.
    """
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(target, filter="data")
            _check_end(opened)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(
            f"{archive} cannot be unpacked ({error})", "check the archive, and the room in the cache directory"
        ) from error


def _check_end(opened: tarfile.TarFile) -> None:
    """Raise if an archive ends early, or its compression says that it is damaged: that is known at its end alone."""
    stream: Any = opened.fileobj
    stream.seek(opened.offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("damaged in the middle")
    if stream.tell() == opened.offset:
        raise tarfile.ReadError("cut off")
    while stream.read(_BLOCK_BYTES):
        pass


def push(files: dict[str, Path], target: S3Target, prefix: str, show: Show, *, delete: bool = False) -> Result:
    """Make the bucket hold these files under ``prefix``, and ``SHA256SUMS`` last.

    Args:
        files: Relative name to path.
        target: The bucket.
        prefix: Empty or ending in a slash.
        show: Told how far it has come.
        delete: Remove what is under the prefix and not among the files.

    Raises:
        ConfigError: There are no files, or one cannot be read or has changed meanwhile.
        OriginError: The bucket could not be written. What has arrived stays, hidden, for another try.
    """
    if not files:
        raise ConfigError("there is no file to push", "check the directory, --include and --exclude")
    total = sum(path.stat().st_size for path in files.values())
    sums = _sums(files, total, show)
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(files)).encode()
    marker, manifest = f"{prefix}{MARKER}", f"{prefix}{SUMS_NAME}"
    there = {info.id.key.removeprefix(prefix): info.size for info in target.list(prefix)}
    extra = sorted(there.keys() - files.keys() - {MARKER, SUMS_NAME}) if delete else []
    same = MARKER not in there and all(there.get(name) == path.stat().st_size for name, path in files.items())
    if same and not extra and target.get_small(manifest, len(text) + 1) == text:
        show("push", Step(total, total, finished=True, mark=total))
        return Result(len(files), total)
    target.put_small(marker, json.dumps({"files": len(files), "size": total, "began": int(time.time())}).encode())
    if SUMS_NAME in there:
        target.delete(manifest)
    sent = _send_all(files, sums, target, prefix, show)
    for name in extra:
        target.delete(f"{prefix}{name}")
    target.put_small(manifest, text)
    target.delete(marker)
    return Result(len(files), total, sum(map(bool, sent)), sum(sent), len(extra))


def _sums(files: dict[str, Path], total: int, show: Show) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    done = _Count()

    def hash_one(path: Path) -> str:
        hasher = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while (data := file.read(_BLOCK_BYTES)) and not done.stopped:
                    hasher.update(data)
                    done.add(len(data))
        except OSError as error:
            _unreadable(error)
        return hasher.hexdigest()

    with ThreadPoolExecutor(HASHERS) as pool:
        running = {name: pool.submit(hash_one, path) for name, path in files.items()}
        _watch(list(running.values()), done, total, "hash", show)
    return {name: one.result() for name, one in running.items()}


def _send_all(files: dict[str, Path], sums: dict[str, str], target: S3Target, prefix: str, show: Show) -> list[int]:
    """Write all files; return the bytes sent of each."""
    there = _Count()

    def send(name: str, parts: ThreadPoolExecutor) -> int:
        own = 0

        def tell(count: int, was_sent: bool) -> None:
            nonlocal own
            if there.stopped:
                raise OriginError("given up: another file could not be written")
            own += count if was_sent else 0
            there.add(count)

        target.send(f"{prefix}{name}", files[name], sums[name], parts, tell)
        return own

    total = sum(path.stat().st_size for path in files.values())
    with ThreadPoolExecutor(PARTS_AT_ONCE) as parts, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        running = [pool.submit(send, name, parts) for name in files]
        _watch(running, there, total, "push", show)
    return [one.result() for one in running]


def _watch(running: Sequence[Future[Any]], done: _Count, total: int, what: str, show: Show) -> None:
    """Show progress until all have ended; raise the first failure at once, and begin nothing more."""
    try:
        while True:
            failed = next((one for one in running if one.done() and one.exception() is not None), None)
            if failed is not None:
                failed.result()
            finished = all(one.done() for one in running)
            show(what, Step(done.value, total, finished, done.value))
            if finished:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        done.stopped = True
        for one in running:
            one.cancel()
