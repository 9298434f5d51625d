"""An origin in memory, checked by the same conformance tests as the real ones."""

import threading
import time
from collections.abc import Callable, Iterator

from modelfs.chunks import ByteRange, ObjectId, ObjectInfo
from modelfs.errors import ObjectChangedError, ObjectNotFoundError, OriginError
from modelfs.origins import Sink


class FakeOrigin:
    """Objects in a dictionary; ``fault`` may raise or sleep before any piece of a body.

    ``requests`` records every ``(key, range)``.
    """

    def __init__(self, name: str = "s3://fake", piece: int = 1 << 20) -> None:
        self.name = name
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.requests: list[tuple[str, ByteRange]] = []
        self.fault: Callable[[str, int], None] = lambda key, position: None
        self.piece = piece
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> ObjectInfo:
        version = f'"{abs(hash((key, len(data), time.monotonic_ns())))}"'
        self.objects[key] = (data, version)
        return ObjectInfo(ObjectId(self.name, key, version), len(data), 0)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                data, version = self.objects[key]
                yield ObjectInfo(ObjectId(self.name, key, version), len(data), 0)

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        with self._lock:
            self.requests.append((info.id.key, span))
        if info.id.key not in self.objects:
            raise ObjectNotFoundError(f"{info.id.key} is gone")
        data, version = self.objects[info.id.key]
        if version != info.id.version:
            raise ObjectChangedError(f"{info.id.key} was overwritten")
        if span.stop > len(data):
            raise OriginError("range outside the object")
        sink.connected(lambda: None)
        position = span.start
        while position < span.stop:
            self.fault(info.id.key, position)
            space = sink.space()
            count = min(len(space), span.stop - position, self.piece)
            space[:count] = data[position : position + count]
            position += count
            sink.advance(count)

    def get_small(self, key: str, limit: int) -> bytes | None:
        return self.objects[key][0][:limit] if key in self.objects else None

    def put_small(self, key: str, data: bytes) -> None:
        self.put(key, data)
