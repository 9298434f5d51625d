"""Digests of whole objects: which there are, how they are computed, how publishers write them down.

Pure: text and bytes in, values out. Nothing here knows where a text lies or when a file is hashed.
"""

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

VERIFIED, BAD, UNKNOWN = "verified", "bad", "unknown"
"""What is known of a complete file: it matches its digest, it does not, or nobody has published one."""
ETAG = "ETag"
"""The source of a digest that is only likely to be one: some stores' ETags look like an MD5 and are none."""
_SUM_LINE = re.compile(r"\\?(?P<value>[0-9a-fA-F]{64})(?:[ \t]+\*?(?P<name>\S.*))?")
_BSD_LINE = re.compile(r"SHA256 ?\((?P<name>.+)\) ?= ?(?P<value>[0-9a-fA-F]{64})")
_LINE_LIMIT = 8192
"""Longer lines are no entries: a path has at most 4096 bytes."""
_SUMS_NAMES = re.compile(r"(?:sha256sums?|checksums?)(?:\.txt|\.sha256)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Digest:
    """The digest an object should have: ``value`` in lower-case hex, ``source`` says who published it."""

    algorithm: str
    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What hashing every byte of an object showed; ``digest`` is ``None`` where there was nothing to compare with."""

    state: str
    digest: Digest | None = None


class Hasher(Protocol):
    """Takes an object's bytes in order."""

    def update(self, data: memoryview, /) -> None:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in lower-case hex."""


class _Crc:
    """A cyclic redundancy check with the methods of ``hashlib``'s objects."""

    def __init__(self, step: Callable[[memoryview, int], int], width: int) -> None:
        self._step = step
        self._width = width
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._step(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._width}x}"


def _any_crc(model: str, width: int) -> Callable[[], Hasher]:
    def make() -> Hasher:
        import anycrc  # noqa: PLC0415 - a start is imports, and hashing comes later

        return _Crc(anycrc.Model(model).calc, width)

    return make


ALGORITHMS: dict[str, Callable[[], Hasher]] = {
    "sha256": hashlib.sha256,
    "crc64nvme": _any_crc("CRC64-NVME", 16),
    "crc32c": _any_crc("CRC32-ISCSI", 8),
    "crc32": lambda: _Crc(zlib.crc32, 8),
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "md5": lambda: hashlib.md5(usedforsecurity=False),
}
"""Name to a maker of hashers, the ones that prove most first."""


def from_base64(text: str) -> str | None:
    """Return the hex form of a digest that S3 writes in base64; ``None`` if it is none, as for a sum over parts."""
    try:
        return base64.b64decode(text, validate=True).hex()
    except (binascii.Error, ValueError):
        return None


def is_sums_name(name: str) -> bool:
    """Return whether a file of this name lists the digests of others: ``SHA256SUMS`` and its common spellings."""
    return _SUMS_NAMES.fullmatch(name) is not None


def parse_sums(text: str, default: str = "") -> dict[str, str]:
    """Return ``{path: SHA-256 in hex}`` of a list as ``sha256sum`` writes it (also with ``--tag``).

    Args:
        text: The list; lines that are no entries are passed over.
        default: The path that a digest without one belongs to; empty: none.
    """
    found: dict[str, str] = {}
    for line in map(str.rstrip, text.splitlines()):
        if len(line) > _LINE_LIMIT:
            continue
        match = _SUM_LINE.fullmatch(line) or _BSD_LINE.fullmatch(line)
        if match:
            name = (match["name"] or default).removeprefix("./")
            if name:
                found[name] = match["value"].lower()
    return found


def parse_hub_metadata(text: str) -> str | None:
    """Return the SHA-256 in what ``hf download --local-dir`` keeps of a file, or ``None``.

    Three lines: commit, ETag, time; the ETag of a large file is the Hub's SHA-256 of it. Source:
    ``huggingface_hub/_local_folder.py``.
    """
    lines = text.splitlines()
    if len(lines) == 3 and re.fullmatch(r"[0-9a-f]{64}", lines[1]):
        return lines[1]
    return None
