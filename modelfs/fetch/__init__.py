"""The fetch engine: one download per chunk, whoever asks; readers are answered as their bytes arrive.

Shared state (``_active``, the queues) belongs to the trio loop. A run is one GET over adjacent missing
chunks; it executes in a worker thread which fills one chunk buffer after another and reports by
``run_sync_soon``. Order: demand (lowest offset first), then the rest of files being read, then the plan.

A chunk's life: wanted → active (has a buffer, is being filled; readers wait for their own bytes) →
complete → written to the store and released, or, where the store has no room, kept in its buffer until
the buffer is needed. Memory: the pool's buffers and nothing else. The engine knows no inode and no handle.
"""

import contextlib
import functools
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import trio

from modelfs.chunks import CHUNK_BYTES, MIB, ByteRange, ObjectInfo
from modelfs.errors import (
    ModelfsError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    ReadTimeoutError,
    TransientOriginError,
)
from modelfs.fetch.pace import INTERVAL_SECONDS, Pace
from modelfs.fetch.planner import MAX_RUN_CHUNKS, Planner
from modelfs.fetch.runs import (
    DEMAND_RUNS,
    Active,
    GivenUpError,
    PlanItem,
    Pool,
    Run,
    RunSink,
    Waiter,
)
from modelfs.memory import Memory
from modelfs.metrics import Metrics
from modelfs.origins import Origin
from modelfs.store import Store, StoredObject
from modelfs.threads import in_background

__all__ = ["HEDGE_SAMPLES", "Fetch", "PlanItem", "default_budget"]

log = logging.getLogger(__name__)

STALL_SECONDS, STALL_BYTES = 10.0, 64 * 1024
"""A run that gained less in so long is broken off and resumed on another connection; to a reader it is no progress."""
HEDGE_FACTOR = 3.0
"""A reader whose download has no first byte after so many times the 95th percentile gets a second one beside it."""
HEDGE_SAMPLES = 32
HEDGE_LEAST_SECONDS = 0.1
HEDGE_SHARE = 0.03
"""Most bytes asked for twice, of all received."""
WRITERS = 4
"""Chunks written at once: with two, sixteen readers at once nearly always had chunks served and not kept."""
_AGAIN_SECONDS = 1.0
"""The kernel asks once more for a page whose read failed: what just ran into its deadline does not wait for another."""
_RETRY_SECONDS = 0.5


class Fetch:
    """Downloads chunks into the store and answers readers on the way.

    Args:
        store: Where complete chunks go.
        origins: Origin name to origin.
        metrics: Counters.
        budget_bytes: Memory for buffers.
        memory: Where they lie.
        whole_files: Whether a read makes the rest of its file wanted (prefetch is on).
        on_failed: Called with an object and why a download of it failed, whether it will be tried again or not.
        max_runs: Downloads at once.
        read_timeout: Longest wait of a reader without progress, in seconds.
    """

    def __init__(
        self,
        *,
        store: Store,
        origins: Mapping[str, Origin],
        metrics: Metrics,
        budget_bytes: int,
        memory: Memory,
        whole_files: bool,
        on_failed: Callable[[ObjectInfo, OriginError], None],
        max_runs: int,
        read_timeout: float,
    ) -> None:
        self._store = store
        store.on_evict.append(self._evicted)
        self._read_timeout = read_timeout
        self._origins = origins
        self._metrics = metrics
        self._pool = Pool(budget_bytes, memory, metrics)
        self._on_failed = on_failed
        self._active: dict[tuple[int, int], Active] = {}
        self._owner: dict[tuple[int, int], Run] = {}
        self._demand: list[tuple[int, int, StoredObject]] = []
        self._demand_waiters: dict[tuple[int, int], list[Waiter]] = {}
        self._sequence = itertools.count()
        self._runs: set[Run] = set()
        self._writes = 0
        self._work = trio.Event()
        self._write_limiter = trio.CapacityLimiter(WRITERS)
        self._max_runs = max_runs
        self._planner = Planner(
            wanted=self._wanted,
            most_bytes=lambda: store.limit_bytes - store.headroom_bytes,
            objects=store.object,
            whole_files=whole_files,
            max_runs=max_runs,
            buffers=self._pool.plan_capacity,
        )
        self._pace = Pace(max(1, max_runs - DEMAND_RUNS))
        self._ended_runs_bytes = 0
        self._run_limiter = trio.CapacityLimiter(max_runs)
        self._progressed = trio.Event()
        self._silent: dict[tuple[int, int], float] = {}
        self._nursery: trio.Nursery | None = None
        self.closing = False
        self.received_bytes = 0
        self._busy_seconds = 0.0
        self._busy_since = 0.0
        self._first_bytes: deque[float] = deque(maxlen=256)
        self._hedges = 0

    # -- what callers may do ------------------------------------------------------------------------

    async def obtain(self, stored: StoredObject, index: int, span: ByteRange) -> memoryview | None:
        """Wait until ``span``, inside chunk ``index``, can be read.

        Returns:
            The bytes, valid until the caller's next checkpoint, or ``None`` if the chunk is in the store.

        Raises:
            OriginError: The bytes cannot be had.
            ReadTimeoutError: No progress before the deadline.
        """
        key = (stored.info.number, index)
        now = trio.current_time()
        deadline = now + (
            self._read_timeout if now > self._silent.get(key, float("-inf")) + _AGAIN_SECONDS else _AGAIN_SECONDS
        )
        needed = span.stop - index * CHUNK_BYTES
        active = self._active.get(key)
        reached = active.filled if active is not None else 0
        failure: ModelfsError | None = None
        while True:
            view = self.peek(stored, index, span)
            if view is not None or index in stored.chunks:
                return view
            active = self._active.get(key)
            if active is not None and active.filled >= reached + STALL_BYTES:
                reached, deadline = active.filled, trio.current_time() + self._read_timeout
            waiter = Waiter(needed)
            self._wait_for(stored, index, waiter)
            with trio.move_on_at(deadline) as scope:
                try:
                    await waiter.event.wait()
                finally:
                    self._stop_waiting(key, waiter)
            if waiter.error is not None:
                failure = waiter.error
                if not failure.retryable:
                    raise failure
                if trio.current_time() + _RETRY_SECONDS > deadline:
                    self._note_silent(key)
                    raise failure
                await trio.sleep(_RETRY_SECONDS)
            elif scope.cancelled_caught:
                active = self._active.get(key)
                if active is not None and active.filled >= reached + STALL_BYTES:
                    continue  # slow, but not silent
                self._note_silent(key)
                why = f" (last failure: {failure.what})" if failure is not None else ""
                raise ReadTimeoutError(
                    f"no progress on {stored.info.id.key} for {self._read_timeout:.0f} s{why}",
                    "check the network and the store, or raise --read-timeout",
                )

    def _note_silent(self, key: tuple[int, int]) -> None:
        now = trio.current_time()
        self._silent = {one: since for one, since in self._silent.items() if now < since + _AGAIN_SECONDS}
        self._silent[key] = now

    def peek(self, stored: StoredObject, index: int, span: ByteRange) -> memoryview | None:
        """Return ``span``, inside chunk ``index``, if a buffer holds it; valid until the next checkpoint."""
        active = self._active.get((stored.info.number, index))
        if active is None or active.filled < span.stop - active.span.start:
            return None
        return active.view[span.start - active.span.start : span.stop - active.span.start]

    def note_read(self, stored: StoredObject, span: ByteRange) -> None:
        """Tell of a read of a file that is not complete: what follows it is wanted soon."""
        self._planner.note_read(stored, span)
        self._work.set()

    def submit(self, items: Iterable[PlanItem], rank: int) -> None:
        """Add to the plan; lower ranks come first, equal ones in the order given."""
        self._planner.submit(items, rank)
        self._work.set()

    def poke(self) -> None:
        """Look for work again, as when room has been made."""
        self._work.set()

    def drop_ahead(self, stored: StoredObject) -> None:
        """Forget a file's reader position, as when its last open is gone."""
        self._planner.forget_reader(stored)

    @property
    def idle(self) -> bool:
        """Whether nothing is running, wanted or being written."""
        return not (self._runs or self._demand or self._planner.items or self._writes)

    @property
    def busy(self) -> bool:
        """Whether something is running, waited for or being written; what is only planned may stay so for long."""
        return bool(self._runs or self._demand or self._writes)

    def statistics(self) -> dict[str, float]:
        """Return the engine's current numbers."""
        return {
            "runs": len(self._runs),
            "runs_allowed": self._pace.allowed,
            "buffers_used": self._pool.used,
            "buffers": self._pool.capacity,
            "plan_items": self._planner.items,
            "demand": len(self._demand),
            "received_bytes": self.received_bytes,
            "busy_seconds": round(self._busy_seconds + (time.monotonic() - self._busy_since if self._runs else 0.0), 3),
        }

    # -- waiting ------------------------------------------------------------------------------------

    def _wait_for(self, stored: StoredObject, index: int, waiter: Waiter) -> None:
        key = (stored.info.number, index)
        active = self._active.get(key)
        if active is not None:
            self._metrics.fetch_joined.inc()
            active.waiters.append(waiter)
            active.refs += 1
            active.demand = True
            active.needed = min(active.needed, waiter.needed)
            if active.filled >= active.needed:  # the thread passed it between the check and this line
                self.wake(active)
            return
        waiting = self._demand_waiters.setdefault(key, [])
        waiting.append(waiter)
        run = self._owner.get(key)
        if run is not None:
            run.stop = min(run.stop, index)  # the run has not come so far: a GET of its own is sooner
            self._disown(run, range(index, index + MAX_RUN_CHUNKS))
        if len(waiting) == 1:
            heapq.heappush(self._demand, (index, next(self._sequence), stored))
        self._work.set()

    def _disown(self, run: Run, chunks: range) -> None:
        for index in chunks:
            if self._owner.get((run.stored.info.number, index)) is run:
                del self._owner[run.stored.info.number, index]

    def _stop_waiting(self, key: tuple[int, int], waiter: Waiter) -> None:
        waiting = self._demand_waiters.get(key)
        if waiting and waiter in waiting:
            waiting.remove(waiter)
            if not waiting:
                del self._demand_waiters[key]
        active = self._active.get(key)
        if active is not None and waiter in active.waiters:
            active.waiters.remove(waiter)
            active.refs -= 1
            if not active.refs:
                self._work.set()  # its buffer may be taken now

    def wake(self, active: Active) -> None:
        """Let readers go whose bytes are here; runs on the loop."""
        for waiter in active.waiters:
            if active.filled >= waiter.needed:
                waiter.event.set()
        waiting = [waiter.needed for waiter in active.waiters if not waiter.event.is_set()]
        active.needed = min(waiting, default=CHUNK_BYTES + 1)

    # -- choosing work ------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Download until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._watch_stalls)
            nursery.start_soon(self._keep_pace)
            task_status.started()
            try:
                while True:
                    await self._work.wait()
                    self._work = trio.Event()
                    self._dispatch()
            finally:
                self.closing = True
                for run in self._runs:
                    if run.abort is not None:
                        with contextlib.suppress(OSError, ValueError):
                            run.abort()

    def _dispatch(self) -> None:
        """Start runs while there is work, a free connection and a buffer."""
        while True:
            run = self._next_run()
            if run is None:
                return
            for index in run.chunks:
                self._owner[run.stored.info.number, index] = run
            first = self._begin_chunk(run, run.start)
            if first is None:
                self._disown(run, run.chunks)
                if run.of_plan:
                    self._planner.put_back(run, run.start)
                if run.demand:
                    heapq.heappush(self._demand, (run.start, next(self._sequence), run.stored))
                return
            self._start(run, first)

    def _start(self, run: Run, first: Active) -> None:
        assert self._nursery is not None
        if not self._runs:
            self._busy_since = time.monotonic()
        run.began = time.monotonic()
        self._runs.add(run)
        self._metrics.fetch_active.set(len(self._runs))
        self._store.acquire(run.stored)
        self._nursery.start_soon(self._run, run, first)

    def _cut_runs_short(self) -> None:
        """Let downloads ahead of readers end with the chunk they are at: a reader waits for a place."""
        for run in self._runs:
            if not run.demand:
                run.stop = min(run.stop, run.at + 1)
                self._disown(run, range(run.stop, run.at + 1 + MAX_RUN_CHUNKS))

    def _wanted(self, stored: StoredObject, index: int) -> bool:
        key = (stored.info.number, index)
        return index not in stored.chunks and key not in self._active and key not in self._owner

    def _next_run(self) -> Run | None:
        while self._demand:
            index, _, stored = self._demand[0]
            if (stored.info.number, index) not in self._demand_waiters or not self._wanted(stored, index):
                heapq.heappop(self._demand)
            elif len(self._runs) >= self._max_runs:
                self._cut_runs_short()
                return None
            else:
                heapq.heappop(self._demand)
                return Run(stored, index, index + 1, demand=True)
        if len(self._runs) >= self._pace.allowed:
            return None
        if self._reclaimable(demand=False) is None:
            return None
        return self._planner.next_run()

    # -- running ------------------------------------------------------------------------------------

    def _reclaimable(self, *, demand: bool) -> list[Active] | None:
        """Return the chunks to give up for another buffer, of those that only lie in memory and that nobody reads.

        ``None`` if there are too few; an empty list where a buffer is free.
        """
        lacking = self._pool.lacking(demand=demand)
        if not lacking:
            return []
        held = [
            active for active in self._active.values() if active.complete and not active.refs and not active.writing
        ]
        held.sort(key=lambda active: self._planner.worth(active.stored, active.index))
        return held[:lacking] if len(held) >= lacking else None

    def _take_buffer(self, *, demand: bool) -> int | None:
        victims = self._reclaimable(demand=demand)
        if victims is None:
            return None
        for victim in victims:
            self._forget(victim)
        return self._pool.take()

    def _begin_chunk(self, run: Run, index: int) -> Active | None:
        """Give chunk ``index`` of ``run`` a buffer and make it active; ``None`` if there is no room for it."""
        key = (run.stored.info.number, index)
        waiters = self._demand_waiters.get(key, [])
        demand = run.demand or bool(waiters)
        span = run.stored.info.chunk_range(index)
        reserved = self._reserve(run, index, demand=demand)
        run.refused = not reserved and not demand
        if run.refused:
            return None
        buffer = self._take_buffer(demand=demand)
        if buffer is None:
            if reserved:
                self._store.unreserve(len(span))
            return None
        active = Active(run.stored, index, span, buffer, self._pool.view(buffer, len(span)), reserved, demand)
        run.at = index
        if run.hedges is not None:
            return active  # it takes the place of the other when it has been quicker
        self._active[key] = active
        active.waiters = self._demand_waiters.pop(key, [])
        active.refs = len(active.waiters)
        active.needed = min((waiter.needed for waiter in active.waiters), default=CHUNK_BYTES + 1)
        return active

    @property
    def _disk_lags(self) -> bool:
        """Whether most buffers wait for the disk: it must not hold back readers, so demand is not stored then."""
        return self._writes >= self._pool.capacity * 3 // 4

    def _reserve(self, run: Run, index: int, *, demand: bool) -> bool:
        """Set room in the store aside for a chunk."""
        if index in run.stored.evicting or (demand and self._disk_lags):
            return False
        size = len(run.stored.info.chunk_range(index))
        return self._store.reserve(size, since=None if demand else run.since)

    async def _run(self, run: Run, first: Active) -> None:
        """Own one run from its first buffer to its end."""
        sink = RunSink(self, run, first, trio.lowlevel.current_trio_token())
        span = ByteRange(first.span.start, run.stored.info.chunk_range(run.stop - 1).stop)
        run.seen_at = time.monotonic()
        try:
            receive = functools.partial(self._origin(run.stored.info).read_into, run.stored.info, span, sink)
            await trio.to_thread.run_sync(in_background, receive, limiter=self._run_limiter)
            self._planner.note_success()
        except GivenUpError:
            pass
        except OriginError as error:
            self._run_failed(run, sink, error)
        except Exception as error:
            log.exception("unexpected failure while downloading %s", run.stored.info.id.key)
            failure = f"downloading {run.stored.info.id.key} failed unexpectedly ({type(error).__name__})"
            self._run_failed(run, sink, TransientOriginError(failure))
        finally:
            self._runs.discard(run)
            if run.first_byte_at:
                self._first_bytes.append(run.first_byte_at - run.began)
            if not self._runs:
                self._busy_seconds += time.monotonic() - self._busy_since
            self._ended_runs_bytes += run.progress
            self._metrics.fetch_active.set(len(self._runs))
            if sink.current is not None:
                self._abandon(sink.current)
            self._disown(run, range(run.start, run.stop + MAX_RUN_CHUNKS))
            self._planner.put_back(run, sink.index)
            self._store.release(run.stored)
            self._work.set()

    def _origin(self, info: ObjectInfo) -> Origin:
        origin = self._origins.get(info.id.origin)
        if origin is None:  # known from another mount of this cache
            raise ObjectNotFoundError(f"{info.id.key} lies in {info.id.origin}, which is no source of this mount")
        return origin

    def _run_failed(self, run: Run, sink: "RunSink", error: OriginError) -> None:
        run.failed = True
        self._on_failed(run.stored.info, error)
        if isinstance(error, ObjectChangedError | ObjectNotFoundError):
            self._planner.drop(run)
        current = sink.current
        if current is not None and (current.lost or (run.hedges is not None and not current.waiters)):
            return  # the other download of the chunk is still there
        waiters = current.waiters if current is not None else []
        for waiter in waiters:
            waiter.error = error
        if not waiters and self._planner.pause() and not error.retryable:
            log.warning("cannot download: %s", error)

    def _abandon(self, active: Active) -> None:
        """Take back an unfinished chunk; its waiters look again and find the failure or ask anew."""
        if self._active.get(active.key) is active:
            del self._active[active.key]
        if active.reserved:
            self._store.unreserve(len(active.span))
        for waiter in active.waiters:
            waiter.event.set()
        active.waiters.clear()
        self._free(active)

    def _free(self, active: Active) -> None:
        active.view.release()
        self._pool.give(active.buffer)
        self._work.set()

    def _evicted(self, stored: StoredObject, indices: list[int]) -> None:
        """Let go of chunks that are local no more: wrong ones must not be served, any may be wanted again."""
        for index in indices:
            active = self._active.get((stored.info.number, index))
            if active is not None and active.complete:
                self._forget(active)  # a reader just woken finds nothing and waits anew

    def _forget(self, active: Active) -> None:
        self._active.pop(active.key, None)
        self._free(active)

    async def next_chunk(self, run: Run, index: int) -> Active | None:
        """Return the run's next active chunk, or ``None`` if it ends here; called from the run's thread."""
        number = run.stored.info.number
        while index < run.stop and self._owner.get((number, index)) is run:
            active = self._begin_chunk(run, index)
            if active is not None:
                return active
            if run.refused:
                return None
            run.waiting_for_buffer = True
            with trio.move_on_after(1):
                await self._progress_event().wait()
            run.waiting_for_buffer = False
        return None

    def _progress_event(self) -> trio.Event:
        if self._progressed.is_set():
            self._progressed = trio.Event()
        return self._progressed

    def chunk_done(self, run: Run, active: Active, sums: bytes) -> None:
        """Take a complete chunk from a run; runs on the loop."""
        if active.lost or (run.hedges is not None and not self.overtaken(run, active)):
            self._abandon(active)
            return
        active.complete = True
        self._disown(run, range(active.index, active.index + 1))
        self.received_bytes += len(active.span)
        if not active.demand:
            self._metrics.prefetch_bytes.inc(len(active.span))
        self.wake(active)
        if not active.reserved:
            active.reserved = self._reserve(run, active.index, demand=active.demand)  # there may be room by now
        if not active.reserved:
            reason = "slow_disk" if self._disk_lags else self._store.skip_reason
            self._metrics.store_skipped.labels(reason=reason).inc()
            self._work.set()
            return
        assert self._nursery is not None
        active.writing = True
        self._writes += 1
        self._nursery.start_soon(self._persist, active, sums)

    async def _persist(self, active: Active, sums: bytes) -> None:
        """Write a complete chunk to the store.

        The bytes go around the page cache and stay in the buffer until it is needed: copying them into fresh
        pages would take longer than receiving them (a 1 GiB model: 2.8 s in all instead of 1.3).
        """
        stored = active.stored
        size = len(active.span)
        self._store.acquire(stored)
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(
                    self._store.write_sync, stored, active.index, active.view, limiter=self._write_limiter
                )
        except OSError as error:
            active.reserved = False
            self._store.unreserve(size)
            self._metrics.store_skipped.labels(reason=self._store.disk_failed(error)).inc()
        else:
            self._store.added(stored, active.index, sums)
        finally:
            self._writes -= 1
            active.writing = False
            self._store.release(stored)
        self._progressed.set()
        self._work.set()

    async def _keep_pace(self) -> None:
        while True:
            if not self._runs:
                await self._work.wait()
            await trio.sleep(INTERVAL_SECONDS)
            self._hedge(time.monotonic())
            received = self._ended_runs_bytes + sum(run.progress for run in self._runs)
            before = self._pace.allowed
            self._pace.look(time.monotonic(), received, saturated=len(self._runs) >= before)
            if self._pace.allowed > before:
                self._work.set()

    def _hedge(self, now: float) -> None:
        """Ask once more for what readers wait for, where the first byte is later than nearly always."""
        if len(self._first_bytes) < HEDGE_SAMPLES:
            return
        usual = sorted(self._first_bytes)[int(0.95 * len(self._first_bytes))]
        late = now - max(HEDGE_LEAST_SECONDS, HEDGE_FACTOR * usual)
        for run in list(self._runs):
            active = self._active.get((run.stored.info.number, run.at))
            waited_for = active is not None and active.waiters and not (run.progress or run.hedged)
            if waited_for and run.hedges is None and run.began < late and self._may_hedge():
                run.hedged = True
                twin = Run(run.stored, run.at, run.at + 1, demand=True, hedges=active)
                first = self._begin_chunk(twin, run.at)
                if first is None:
                    return
                self._hedges += 1
                self._metrics.fetch_hedged.inc()
                self._start(twin, first)

    def _may_hedge(self) -> bool:
        return len(self._runs) < self._max_runs and self._hedges * CHUNK_BYTES <= HEDGE_SHARE * self.received_bytes

    def overtaken(self, run: Run, active: Active) -> bool:
        """Let a hedge that has bytes take the place of the download it hedges, if that has none; on the loop."""
        slow = run.hedges
        assert slow is not None
        if self._active.get(active.key) is active:
            return True
        if self._active.get(active.key) is not slow or slow.filled:
            active.lost = True
            return False
        slow.lost = True
        self._active[active.key] = active
        active.waiters, slow.waiters = slow.waiters, []
        active.refs, slow.refs = slow.refs, 0
        self.wake(active)
        return True

    async def _watch_stalls(self) -> None:
        """Break off runs that gain nothing; the origin resumes them at the byte reached."""
        while True:
            await trio.sleep(1)
            now = time.monotonic()
            for run in list(self._runs):
                if run.progress >= run.seen + STALL_BYTES or run.waiting_for_buffer:
                    run.seen, run.seen_at = run.progress, now
                elif now - run.seen_at > STALL_SECONDS and run.abort is not None:
                    log.warning("no progress on %s for %.0f s: reconnecting", run.stored.info.id.key, STALL_SECONDS)
                    run.seen, run.seen_at = run.progress, now
                    with contextlib.suppress(OSError, ValueError):
                        run.abort()
            self._work.set()  # a pause may be over, of the plan or of a reader
            self._progressed.set()


def default_budget(available_bytes: int, max_runs: int) -> int:
    """Return the bytes for buffers on a machine with so much free memory: a quarter, at most 1.5 chunks per run."""
    most = max_runs * 3 // 2 * CHUNK_BYTES
    return max(64 * MIB, min(most, available_bytes // 4))
