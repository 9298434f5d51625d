"""Data files: one sparse file per object version, contiguous, so that a complete one is a plain file.

Blocking system calls only; called from worker threads. Knows neither index nor policy.
"""

import ctypes
import errno
import os
from pathlib import Path

import xxhash

from modelfs.chunks import PIECE_BYTES, ByteRange
from modelfs.errors import CacheError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
SUM_BYTES = 8
STORE_NAME = ".modelfs"
"""The store inside a directory that ``modelfs get`` filled."""
_DIRECT_ALIGNMENT = 4096
"""Offsets, lengths and memory of an O_DIRECT write; enough for every common disk."""


class CorruptChunkError(Exception):
    """Stored bytes do not match their checksum."""


def data_path(directory: Path, number: int) -> Path:
    """Return the data file's path of an object number."""
    return directory / f"{number:016x}"


def open_data(path: Path, size: int) -> int:
    """Open the data file, made at its full (sparse) size if missing; return the descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_size != size:
        os.ftruncate(descriptor, size)
    return descriptor


def checksum(data: memoryview) -> bytes:
    """Return the checksums of a chunk: one big-endian xxh3-64 per piece, in order."""
    return b"".join(
        xxhash.xxh3_64_digest(data[start : start + PIECE_BYTES]) for start in range(0, len(data), PIECE_BYTES)
    )


def write_chunk(path: Path, size: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` (both block-aligned but for the end of the file).

    Whole blocks go around the page cache where the file system can.

    Args:
        path: The data file, made at ``size`` bytes if missing.
        size: The object's size.
        data: The chunk, in page-aligned memory.
        offset: Where it lies in the object.

    Raises:
        OSError: As the kernel says (ENOSPC, EIO).
    """
    descriptor = open_data(path, size)
    try:
        written = _write_direct(path, data[: len(data) & ~(_DIRECT_ALIGNMENT - 1)], offset)
        data, offset = data[written:], offset + written
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count
    finally:
        os.close(descriptor)


def _write_direct(path: Path, data: memoryview, offset: int) -> int:
    """Write with O_DIRECT; return how many bytes were written, 0 where it is not possible."""
    if not data:
        return 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise
    try:
        return os.pwrite(descriptor, data, offset)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise
    finally:
        os.close(descriptor)


def read_at(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill ``target``; raise ``CorruptChunkError`` where the file ends before."""
    while target:
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise CorruptChunkError("the data file is shorter than the object")
        target, offset = target[count:], offset + count


def read_verified(descriptor: int, chunk: ByteRange, sums: bytes, span: ByteRange, target: memoryview) -> None:
    """Fill ``target`` with ``span`` (inside ``chunk``), checking every piece it touches.

    Raises:
        CorruptChunkError: A piece does not match its checksum, or is missing.
    """
    scratch: bytearray | None = None
    position = span.start
    while position < span.stop:
        number = (position - chunk.start) // PIECE_BYTES
        start = chunk.start + number * PIECE_BYTES
        stop = min(start + PIECE_BYTES, chunk.stop)
        end = min(stop, span.stop)
        wanted = target[position - span.start : end - span.start]
        if position == start and end == stop:
            piece = wanted
        else:
            scratch = scratch or bytearray(PIECE_BYTES)
            piece = memoryview(scratch)[: stop - start]
        read_at(descriptor, piece, start)
        if xxhash.xxh3_64_digest(piece) != sums[number * SUM_BYTES : (number + 1) * SUM_BYTES]:
            raise CorruptChunkError(f"piece {number} at offset {start} does not match its checksum")
        if piece is not wanted:
            wanted[:] = piece[position - start : end - start]
        position = end


def punch(path: Path, spans: list[ByteRange]) -> None:
    """Give the blocks of ``spans`` back to the file system; the file keeps its size.

    Raises:
        OSError: The file system cannot punch holes.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for span in spans:
            if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, span.start, len(span)):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(descriptor)


def prepare(directory: Path) -> None:
    """Make the directory private and writable; one that is merely full will do.

    Raises:
        CacheError: It cannot be made or written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        probe = directory / ".probe"
        try:
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
    except OSError as error:
        raise CacheError(
            f"cache directory {directory} cannot be used ({error.strerror})", "choose a writable --cache-dir"
        ) from error
