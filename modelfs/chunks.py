"""Identities and arithmetic: object versions, half-open byte ranges, chunk numbers.

Pure: no I/O, no clock. A chunk is the unit of index and eviction; every object version is cut into
chunks of ``CHUNK_BYTES`` from offset 0, the last one may be shorter.
"""

import hashlib
from dataclasses import dataclass, field

MIB = 1024 * 1024

CHUNK_BYTES = 8 * MIB
"""Chunk size in bytes. Peers converge on 8 MiB parts; smaller chunks cost requests, larger ones latency."""

PIECE_BYTES = 1 * MIB
"""Unit of verification in bytes: the largest READ the kernel sends with 4 KiB pages, so that one READ
never has to check more than its own pieces."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Half-open byte interval ``[start, stop)``; offsets and lengths appear only at the FUSE and HTTP edges."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"bad range [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ObjectId:
    """One version of one object: where it lives, its full key, and the version tag (ETag) the store gave it."""

    origin: str
    key: str
    version: str


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing tells of one object version.

    ``number`` is a 63-bit number derived from the identity alone. It is the inode number in the tree
    and the key in the store: the same after a restart, on another node and with another cache, and a
    changed object is another number. ``locator`` is what an origin needs besides the key to find this very version, as
    the Hub's commit; it is no part of the identity.
    """

    id: ObjectId
    size: int
    mtime_ns: int
    locator: str = field(default="", compare=False)
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", stable_number(self.id.origin, self.id.key, self.id.version))

    @property
    def chunk_count(self) -> int:
        """How many chunks the object has; 0 for an empty one."""
        return -(-self.size // CHUNK_BYTES)

    def chunk_range(self, index: int) -> ByteRange:
        """Return the bytes of chunk ``index``; the last chunk ends with the object."""
        start = index * CHUNK_BYTES
        if not 0 <= start < self.size:
            raise ValueError(f"chunk {index} outside an object of {self.size} bytes")
        return ByteRange(start, min(start + CHUNK_BYTES, self.size))

    def clip(self, offset: int, length: int) -> ByteRange:
        """Return the part of ``[offset, offset + length)`` that lies inside the object."""
        start = min(offset, self.size)
        return ByteRange(start, min(start + length, self.size))


def stable_number(*parts: str) -> int:
    """Return a 63-bit number for a tuple of strings; never 0 or 1 (FUSE keeps those)."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) | 2


def chunks_of(span: ByteRange) -> range:
    """Return the numbers of the chunks that ``span`` touches; empty for an empty span."""
    if not len(span):
        return range(0)
    return range(span.start // CHUNK_BYTES, (span.stop - 1) // CHUNK_BYTES + 1)


def split(span: ByteRange) -> list[tuple[int, ByteRange]]:
    """Cut ``span`` at chunk borders; return ``(chunk number, absolute range)`` in order."""
    return [
        (index, ByteRange(max(span.start, index * CHUNK_BYTES), min(span.stop, (index + 1) * CHUNK_BYTES)))
        for index in chunks_of(span)
    ]


@dataclass(frozen=True, slots=True)
class Step:
    """How far some work has come: ``done`` of ``total`` bytes; it moves while ``mark`` changes."""

    done: int
    total: int
    finished: bool
    mark: object
