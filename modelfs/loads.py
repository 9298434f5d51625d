"""What happened while an engine loaded a model: when, in which order, and what its readers waited for.

One ``Load`` per model and start. Owned by the trio loop; called for every open and every read that comes to
us, so each call is a few dictionary lookups. Reads of passed-through files never come to us: of these we know
the opens. Computes; prints nothing and stores nothing.

Time is shared out by wall clock, not per reader: while one reader waits for the origin and nine for the disk,
the load waits for the origin.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from modelfs.chunks import ByteRange, ObjectInfo, chunks_of
from modelfs.prefetch import is_weights, model_files, model_of
from modelfs.trace import Touch, Trace
from modelfs.tree import File

IDLE_SECONDS = 20.0
"""After so long without an open or a read, the next one begins another load."""
WHOLE_IDLE_SECONDS = 2.0
"""The same for a load that has used all of its weights."""
KEPT = 8
CAUSES = ("origin", "store")
"""What a reader can wait for, the graver one first."""
MAX_TOUCHES = 4096
WORTH_SECONDS = 0.5
"""A load that waited less for the origin has nothing to gain from being replayed."""
_LOOK_SECONDS = 1.0
_LAST_SECONDS = 2.0


@dataclass(slots=True, eq=False)
class Load:
    """One start of one model. Times are monotonic seconds."""

    model: str
    size: int
    began: float
    first_weights: float = 0.0
    last: float = 0.0
    first_token: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    read_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("memory", *CAUSES), 0))
    opens: dict[str, int] = field(default_factory=lambda: {"cached": 0, "passthrough": 0})
    touches: list[Touch] = field(default_factory=list)
    touched_bytes: int = 0
    _outstanding: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    _since: float = 0.0
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def begin(self, cause: str, now: float) -> None:
        """A reader begins to wait for ``cause``."""
        self._account(now)
        self._outstanding[cause] += 1

    def end(self, cause: str, now: float) -> None:
        """A reader has what it waited for."""
        self._account(now)
        self._outstanding[cause] -= 1
        self.last = now

    def _account(self, now: float) -> None:
        worst = next((cause for cause in CAUSES if self._outstanding[cause]), None)
        if worst:
            self.waited[worst] += now - self._since
        self._since = now

    def touch(self, info: ObjectInfo, span: ByteRange, now: float) -> None:
        """Note the first use of what lies in ``span``, chunk by chunk."""
        fresh = [index for index in chunks_of(span) if (info.number, index) not in self._seen]
        for index in fresh:
            self._seen.add((info.number, index))
            part = info.chunk_range(index)
            self.touched_bytes += len(part)
            last = self.touches[-1] if self.touches else None
            if last is not None and last.id == info.id and last.stop == part.start:
                last.stop = part.stop
            elif len(self.touches) < MAX_TOUCHES:
                self.touches.append(Touch(info.id, part.start, part.stop, round(now - self.began, 3)))

    @property
    def patience(self) -> float:
        """Seconds without a sign of the engine after which the load is over."""
        return WHOLE_IDLE_SECONDS if self.touched_bytes >= self.size else IDLE_SECONDS

    def trace(self) -> Trace | None:
        """Return the order of this load, or ``None`` if it hardly waited or did not use most of the weights."""
        if self.waited["origin"] < WORTH_SECONDS:
            return None
        if self.touched_bytes < 0.9 * self.size or len(self.touches) >= MAX_TOUCHES:
            return None
        return Trace(tuple(self.touches))

    def document(self, mounted: float) -> dict[str, Any]:
        """Return the load as data; times in seconds since ``mounted``."""
        return {
            "model": self.model,
            "size": self.size,
            "first_open_seconds": round(self.began - mounted, 3),
            "first_weights_seconds": round(self.first_weights - mounted, 3) if self.first_weights else None,
            "last_read_seconds": round(self.last - mounted, 3),
            "first_token_seconds": round(self.first_token - mounted, 3) if self.first_token else None,
            "waited_seconds": {cause: round(seconds, 3) for cause, seconds in self.waited.items()},
            "read_bytes": dict(self.read_bytes),
            "opens": dict(self.opens),
        }


class Loads:
    """The loads of a mount, and which files belong to the ones in progress."""

    def __init__(self) -> None:
        self.recent: deque[Load] = deque(maxlen=KEPT)
        self._by_file: dict[int, Load] = {}

    @property
    def last(self) -> float:
        """When something was opened or read last."""
        return max((load.last for load in self.recent), default=0.0)

    def opened(self, file: File, mode: str) -> None:
        """A file was opened; mode is ``cached`` or ``passthrough``."""
        directory = model_of(file.parent)
        if directory is None:
            return
        now = time.monotonic()
        load = next((load for load in reversed(self.recent) if load.model == directory.path), None)
        if load is None or now - load.last > IDLE_SECONDS:
            weights = [item for item in model_files(directory) if is_weights(item.name)]
            load = Load(directory.path, sum(item.info.size for item in weights), now)
            self.recent.append(load)
        load.last = now
        self._by_file[file.info.number] = load
        if is_weights(file.name):
            load.opens[mode] += 1
            load.first_weights = load.first_weights or now
            if mode == "passthrough" and file.info.size:
                load.touch(file.info, ByteRange(0, file.info.size), now)

    def read(self, info: ObjectInfo, span: ByteRange) -> Load | None:
        """A read came to us; return the load it belongs to."""
        load = self._by_file.get(info.number)
        if load is not None:
            load.last = time.monotonic()
            if is_weights(info.id.key):
                load.touch(info, span, load.last)
        return load

    async def run(
        self, keep: Callable[[Load], Awaitable[None]], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Hand every load that has come to rest to ``keep``; at the end also those that have not."""
        task_status.started()
        try:
            while True:
                await trio.sleep(_LOOK_SECONDS)
                for load in self._take(time.monotonic()):
                    await keep(load)
        finally:
            with trio.move_on_after(_LAST_SECONDS, shield=True):
                for load in self._take(float("inf")):
                    await keep(load)

    def _take(self, now: float) -> list[Load]:
        """Return the loads that have come to rest, each once."""
        done = {id(load): load for load in self._by_file.values() if now - load.last > load.patience}
        self._by_file = {number: load for number, load in self._by_file.items() if id(load) not in done}
        return list(done.values())
