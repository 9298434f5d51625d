"""The order in which an engine read a model, so that the next node can download in that order.

Pure. A trace names the files by key and version: one that does not fit the model as it is now is ignored as a
whole, never followed in part. Its text comes from the bucket and is hostile input.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modelfs.chunks import ByteRange, ObjectId, ObjectInfo

FORMAT_VERSION = 1
MAX_TEXT_BYTES = 1024 * 1024
_MAX_TOUCHES = 10_000


@dataclass(slots=True)
class Touch:
    """A stretch of one file that was read at once, ``seconds`` after the load began."""

    id: ObjectId
    start: int
    stop: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Trace:
    """One load, in order."""

    touches: tuple[Touch, ...]

    def to_text(self) -> bytes:
        """Serialise; ``from_text`` reads it."""
        rows = [[touch.id.key, touch.id.version, touch.start, touch.stop, touch.seconds] for touch in self.touches]
        return json.dumps({"format": FORMAT_VERSION, "touches": rows}, separators=(",", ":")).encode()

    @classmethod
    def from_text(cls, text: bytes, origin: str) -> "Trace | None":
        """Read what ``to_text`` wrote, of objects of ``origin``; ``None`` if it is anything else."""
        if len(text) > MAX_TEXT_BYTES:
            return None
        try:
            document = json.loads(text)
            if document["format"] != FORMAT_VERSION or len(document["touches"]) > _MAX_TOUCHES:
                return None
            touches = []
            for key, version, start, stop, seconds in document["touches"]:
                if not (isinstance(key, str) and isinstance(version, str)):
                    return None
                touches.append(Touch(ObjectId(origin, key, version), int(start), int(stop), float(seconds)))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        return cls(tuple(touches))

    def spans(self, files: Mapping[ObjectId, ObjectInfo]) -> list[tuple[ObjectInfo, ByteRange]] | None:
        """Return what to fetch in order, or ``None`` if a file is not there in that version and size."""
        found = []
        for touch in self.touches:
            info = files.get(touch.id)
            if info is None or not 0 <= touch.start < touch.stop <= info.size:
                return None
            found.append((info, ByteRange(touch.start, touch.stop)))
        return found


def model_name(infos: Iterable[ObjectInfo]) -> str:
    """Return a name for exactly these versions of these objects: equal on every node, safe in any key."""
    digest = hashlib.sha256()
    for identity in sorted((info.id.key, info.id.version) for info in infos):
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()[:32]
