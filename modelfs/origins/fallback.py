"""A place with another one behind it, which steps in where a file is proved to be the same in both.

The same means: of the same size, and with digests that are known of both and equal. What is only probably the same is
not read under the first's name: bytes of two files would mix. A place that is down is left alone for a while, so that
not every read waits for it. Threads: any.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.digests import Digest
from modelfs.errors import ObjectNotFoundError, OriginError
from modelfs.origins import Origin, Sink

log = logging.getLogger(__name__)

LEAVE_ALONE_SECONDS = 30.0
"""A place that could not be reached is not asked again before, where the other one can be."""


@dataclass(frozen=True, slots=True)
class Twins:
    """What the second place has of a source: the first's object number to the second's equal object."""

    second: Origin
    equal: Mapping[int, ObjectInfo]


class FallbackOrigin:
    """Reads from the second place what the first has lost, or cannot give now.

    Args:
        first: The place whose objects these are.
        count: Called with ``read`` for every download that went to a second place, ``refused`` where it would have to,
            but the file there is not proved to be the same.
    """

    def __init__(self, first: Origin, count: Callable[[str], None]) -> None:
        self._first = first
        self._count = count
        self._twins: dict[str, Twins] = {}
        self._down_until = 0.0
        self.name = first.name

    def pair(self, source: str, twins: Twins) -> None:
        """Take what is known of the second place of ``source``."""
        self._twins = {**self._twins, source: twins}  # readers may be looking through the other one

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Origin.list``; of the first place."""
        return self._first.list(prefix)

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``; from the first place."""
        return self._first.get_small(key, limit)

    def put_small(self, key: str, data: bytes) -> None:
        """See ``Origin.put_small``; to the first place."""
        self._first.put_small(key, data)

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``; as the first place says."""
        return self._first.digest(info)

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        """See ``Origin.read_into``."""
        twin = next(
            ((twins.second, twins.equal[info.number]) for twins in self._twins.values() if info.number in twins.equal),
            None,
        )
        counting = _Counting(sink)
        if twin is None or time.monotonic() >= self._down_until:
            try:
                self._first.read_into(info, span, counting)
                return
            except OriginError as error:
                if not (error.retryable or isinstance(error, ObjectNotFoundError)):
                    raise
                if twin is None:
                    self._count("refused")
                    raise
                if error.retryable:
                    self._down_until = time.monotonic() + LEAVE_ALONE_SECONDS
                log.warning("%s is read from %s: %s", info.id.key, twin[0].name, error)
        self._count("read")
        second, other = twin
        second.read_into(other, ByteRange(span.start + counting.filled, span.stop), sink)


class _Counting:
    """Passes everything on to a sink, and knows how far it has been filled."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.filled = 0

    def space(self) -> memoryview:
        return self._sink.space()

    def advance(self, count: int) -> None:
        self._sink.advance(count)
        self.filled += count

    def connected(self, abort: Callable[[], None]) -> None:
        self._sink.connected(abort)
