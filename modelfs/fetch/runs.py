"""What the fetch engine moves: waiting readers, chunks with a buffer, runs, and the sink of a run.

Records without behaviour of their own, but for the pool of buffers and ``RunSink``, the only code that
works in a run's thread: it fills buffers and crosses to the loop per chunk, or when a reader waits.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from modelfs.chunks import CHUNK_BYTES, PIECE_BYTES, ByteRange, ObjectInfo
from modelfs.errors import ModelfsError
from modelfs.memory import Memory
from modelfs.metrics import Metrics
from modelfs.store import StoredObject
from modelfs.store.files import SUM_BYTES, checksum

MIN_SLICE_BYTES = 64 * 1024
MAX_SLICE_BYTES = 1024 * 1024
"""Bytes received before waiting readers are looked at: few at first, and as many as come in ``SLICE_SECONDS``."""
SLICE_SECONDS = 0.02
DEMAND_RUNS = 2
"""Downloads that only demand may start, so that no plan can starve a reader."""
_LEAST_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class PlanItem:
    """A span of an object that should become local, in the order of the plan."""

    info: ObjectInfo
    span: ByteRange


class GivenUpError(Exception):
    """Nobody wants the rest of this run."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A reader that needs the chunk filled up to ``needed``."""

    needed: int
    event: trio.Event = field(default_factory=trio.Event)
    error: ModelfsError | None = None


@dataclass(slots=True, eq=False)
class Active:
    """A chunk that has a buffer. ``filled`` is written by the run's thread, everything else by the loop.

    ``lost``: another download of the same chunk was quicker; its run is to end.
    """

    stored: StoredObject
    index: int
    span: ByteRange
    buffer: int
    view: memoryview
    reserved: bool
    demand: bool
    filled: int = 0
    needed: int = CHUNK_BYTES + 1
    waiters: list[Waiter] = field(default_factory=list)
    refs: int = 0
    complete: bool = False
    writing: bool = False
    lost: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """Object number and chunk number."""
        return self.stored.info.number, self.index


@dataclass(slots=True, eq=False)
class Run:
    """One GET. ``stop`` may be lowered while it runs, when demand takes a later chunk out of it.

    ``at`` is the chunk it has reached. Where there is no demand, ``since`` is the time (seconds since the epoch) at
    which the download was asked for: what was used later is not evicted for it; ``planned_stop`` is where it was to
    end, 0 if nothing of it is planned (any more); and ``of_plan`` tells it from one ahead of a reader. A run that
    ``hedges`` downloads a chunk that another run is late with.
    """

    stored: StoredObject
    start: int
    stop: int
    demand: bool
    abort: Callable[[], None] | None = None
    progress: int = 0
    seen: int = 0
    seen_at: float = 0.0
    waiting_for_buffer: bool = False
    refused: bool = False
    at: int = 0
    since: float = 0.0
    planned_stop: int = 0
    of_plan: bool = False
    failed: bool = False
    began: float = 0.0
    first_byte_at: float = 0.0
    hedged: bool = False
    hedges: "Active | None" = None

    @property
    def chunks(self) -> range:
        """The chunks still meant to come with this run."""
        return range(self.start, self.stop)


class Pool:
    """Chunk buffers, reused: fresh memory costs more than receiving into it."""

    def __init__(self, budget_bytes: int, memory: Memory, metrics: Metrics) -> None:
        self.capacity = max(_LEAST_BUFFERS, budget_bytes // CHUNK_BYTES)
        # A third is left to demand: the plan is no faster with more, and memory that is fresh costs processor time.
        self.plan_capacity = self.capacity - max(2, self.capacity // 3)
        self._memory = memory
        self._memory.reserve(self.capacity * CHUNK_BYTES)
        self._free = list(reversed(range(self.capacity)))
        self._metrics = metrics

    @property
    def used(self) -> int:
        """How many buffers are taken."""
        return self.capacity - len(self._free)

    def lacking(self, *, demand: bool) -> int:
        """Return how many buffers must come back before one may be taken."""
        return max(0, self.used + 1 - (self.capacity if demand else self.plan_capacity))

    def take(self) -> int:
        """Return a buffer, the one used last; the caller has looked whether one is lacking."""
        buffer = self._free.pop()
        self._metrics.buffer_bytes.set(self.used * CHUNK_BYTES)
        return buffer

    def view(self, buffer: int, size: int) -> memoryview:
        """Return the first ``size`` bytes of a buffer."""
        return self._memory.view(buffer * CHUNK_BYTES, buffer * CHUNK_BYTES + size)

    def give(self, buffer: int) -> None:
        """Take a buffer back."""
        self._free.append(buffer)
        self._metrics.buffer_bytes.set(self.used * CHUNK_BYTES)


class Engine(Protocol):
    """What a sink asks of the engine."""

    closing: bool

    async def next_chunk(self, run: Run, index: int) -> Active | None:
        """Return the run's next chunk, or ``None`` to end the run."""

    def chunk_done(self, run: Run, active: Active, sums: bytes) -> None:
        """Take a complete chunk; on the loop."""

    def wake(self, active: Active) -> None:
        """Let readers go whose bytes are there; on the loop."""

    def overtaken(self, run: Run, active: Active) -> bool:
        """Take notice of a hedge's first bytes; on the loop."""


class RunSink:
    """A run's buffers as the origin sees them. Lives in the run's thread; crosses to the loop per chunk."""

    def __init__(self, engine: Engine, run: Run, first: Active, token: trio.lowlevel.TrioToken) -> None:
        self._engine = engine
        self._run = run
        self._token = token
        self.current: Active | None = first
        self.index = first.index
        self._slice = MIN_SLICE_BYTES
        self._slice_began = 0.0
        self._sums = b""

    def space(self) -> memoryview:
        """See ``Sink.space``; waits for the next chunk's buffer."""
        if self._engine.closing:
            raise GivenUpError
        if self.current is None:
            self.current = trio.from_thread.run(self._engine.next_chunk, self._run, self.index)
            if self.current is None:
                raise GivenUpError
        if self.current.lost:
            raise GivenUpError
        filled, needed = self.current.filled, self.current.needed
        size = self._slice
        if filled < needed <= filled + size:
            size = max(MIN_SLICE_BYTES, needed - filled)  # a reader waits for no more than this
        self._slice_began = time.monotonic()
        return self.current.view[filled : filled + size]

    def advance(self, count: int) -> None:
        """See ``Sink.advance``; tells the loop when a reader's bytes, or a whole chunk, are there."""
        active = self.current
        assert active is not None
        if time.monotonic() - self._slice_began > SLICE_SECONDS:
            self._slice = max(MIN_SLICE_BYTES, self._slice // 2)
        elif count >= self._slice:
            self._slice = min(MAX_SLICE_BYTES, self._slice * 2)
        active.filled += count
        if not self._run.progress:
            self._run.first_byte_at = time.monotonic()
        self._run.progress += count
        self._sum(active)
        if active.filled == len(active.span):
            sums, self._sums = self._sums, b""
            self.current = None
            self.index += 1
            self._token.run_sync_soon(self._engine.chunk_done, self._run, active, sums)
        elif self._run.hedges is not None and active.filled == count:
            self._token.run_sync_soon(self._engine.overtaken, self._run, active)
        elif active.filled >= active.needed:
            active.needed = CHUNK_BYTES + 1
            self._token.run_sync_soon(self._engine.wake, active)

    def _sum(self, active: Active) -> None:
        """Take the checksums of pieces that are whole now, while the processor still has them in its cache."""
        done = len(self._sums) // SUM_BYTES * PIECE_BYTES
        ready = active.filled if active.filled == len(active.span) else active.filled // PIECE_BYTES * PIECE_BYTES
        if ready > done:
            self._sums += checksum(active.view[done:ready])

    def connected(self, abort: Callable[[], None]) -> None:
        """See ``Sink.connected``; where the engine has just closed, ``space`` ends the run."""
        self._run.abort = abort
