"""What to download ahead of readers, and in which order: the rest of files being read, then the plan.

Owned by the trio loop. Knows readers and plans, and of the engine only whether a chunk is wanted; it starts
nothing and holds no buffer.
"""

import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectInfo, chunks_of
from modelfs.fetch.runs import PlanItem, Run
from modelfs.store import StoredObject

MAX_RUN_CHUNKS = 4
"""Longest run in chunks (32 MiB): beyond it the request's latency is under 6 % at 90 MB/s."""
WINDOW_CHUNKS = 16
"""Largest read-ahead, in chunks, of a file that is read in order but not prefetched."""
SILENCE_SECONDS = 0.5
"""A reader that has been silent for so long is not in the middle of a file."""
_FAR_CHUNKS = 1 << 30
"""More than any file has."""
_FIRST, _LAST = 0, 1000
"""Ranks before and behind those of callers."""
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(slots=True, eq=False)
class _Reader:
    """A file being read: where the reader is, and how far ahead of it to download."""

    stored: StoredObject
    cursor: int
    window: int
    read_at: float = 0.0
    since: float = field(default_factory=time.time)

    @property
    def on_its_way(self) -> bool:
        """Whether it reads from front to back now, and is served by copy."""
        return self.stored.copied and self.window > 1 and time.monotonic() - self.read_at < SILENCE_SECONDS


@dataclass(slots=True, eq=False)
class _Planned:
    """An item of the plan on its way: chunks before ``next`` have had their turn, evicted since or not."""

    item: PlanItem
    next: int
    since: float = field(default_factory=time.time)


class Planner:
    """Chooses downloads that no reader waits for.

    Args:
        wanted: Whether a chunk is neither local nor on its way.
        objects: Returns what is stored of an object.
        most_bytes: Returns the largest file that may be downloaded as a whole.
        whole_files: Whether a read makes the rest of its file wanted.
        max_runs: Downloads at once.
        buffers: How many buffers these downloads may use.
    """

    def __init__(
        self,
        *,
        wanted: Callable[[StoredObject, int], bool],
        objects: Callable[[ObjectInfo], StoredObject],
        most_bytes: Callable[[], int],
        whole_files: bool,
        max_runs: int,
        buffers: int,
    ) -> None:
        self._wanted = wanted
        self._objects = objects
        self._most_bytes = most_bytes
        self._whole_files = whole_files
        self._max_runs = max_runs
        self._buffers = buffers
        self._readers: OrderedDict[int, _Reader] = OrderedDict()
        self._plan: list[tuple[int, int, _Planned]] = []
        self._sequence = itertools.count()
        self._failures = 0
        self._resume = 0.0

    @property
    def items(self) -> int:
        """How many items the plan has."""
        return len(self._plan)

    # -- what is wanted -----------------------------------------------------------------------------

    def note_read(self, stored: StoredObject, span: ByteRange) -> None:
        """Tell of a read of a file that is not complete: what follows it is wanted soon."""
        last = (span.stop - 1) // CHUNK_BYTES
        reader = self._readers.get(stored.info.number)
        if reader is None:
            reader = self._readers[stored.info.number] = _Reader(stored, last, 0)
        else:
            self._readers.move_to_end(stored.info.number, last=False)
        reader.read_at = time.monotonic()
        if last in {reader.cursor, reader.cursor + 1}:
            if last != reader.cursor or not reader.window:
                reader.window = min(WINDOW_CHUNKS, max(1, reader.window * 2))
        else:
            reader.window = 0
        reader.cursor = last

    def forget_reader(self, stored: StoredObject) -> None:
        """Forget a file's reader, as when its last open is gone."""
        self._readers.pop(stored.info.number, None)

    def submit(self, items: Iterable[PlanItem], rank: int) -> None:
        """Add to the plan; lower ranks come first, equal ones in the order given."""
        for item in items:
            self._push(rank, _Planned(item, chunks_of(item.span).start))

    def _push(self, rank: int, planned: _Planned) -> None:
        heapq.heappush(self._plan, (rank, next(self._sequence), planned))

    def put_back(self, run: Run, index: int) -> None:
        """Plan again what a download was to bring from chunk ``index`` on, and did not.

        Demand took its place, there was no room, or it failed; then it comes after everything else, which may well
        succeed. A chunk that had arrived has had its turn, evicted since or not.
        """
        info = run.stored.info
        if not run.of_plan and (not self._whole_files or (run.failed and info.number in self._readers)):
            return  # a reader that is still there asks for it by itself
        left = [at for at in range(index, run.planned_stop) if self._wanted(run.stored, at)]
        if left:
            span = ByteRange(info.chunk_range(left[0]).start, info.chunk_range(left[-1]).stop)
            self._push(_LAST if run.failed else _FIRST, _Planned(PlanItem(info, span), left[0], run.since))

    def drop(self, run: Run) -> None:
        """Download nothing more ahead of readers of this run's object."""
        number = run.stored.info.number
        run.planned_stop = 0
        self._readers.pop(number, None)
        self._plan = [entry for entry in self._plan if entry[2].item.info.number != number]
        heapq.heapify(self._plan)

    # -- failures -----------------------------------------------------------------------------------

    def pause(self) -> bool:
        """Pause after a failure, longer each time; return whether a pause has begun.

        Downloads that fail together, as those of one process, are one failure.
        """
        now = time.monotonic()
        if now < self._resume:
            return False
        self._resume = now + _BACKOFF_SECONDS[min(self._failures, len(_BACKOFF_SECONDS) - 1)]
        self._failures += 1
        return True

    def note_success(self) -> None:
        """Begin with the shortest pause again."""
        self._failures = 0

    # -- choosing -----------------------------------------------------------------------------------

    def next_run(self) -> Run | None:
        """Return the next download, or ``None`` if there is nothing to do now."""
        if time.monotonic() < self._resume:
            return None
        return self._next_of_readers() or self._next_of_plan()

    def worth(self, stored: StoredObject, index: int) -> int:
        """Return the worth of a chunk in memory: the more, the sooner a reader comes to it; 0 if none does."""
        reader = self._readers.get(stored.info.number)
        if reader is None or not reader.on_its_way or index < reader.cursor:
            return 0
        return _FAR_CHUNKS - (index - reader.cursor)

    def _reach(self, stored: StoredObject) -> range:
        """Return the chunks that may be downloaded now.

        While a reader is on its way, no more than the buffers hold: what lies further ahead would have left them
        before it comes there, and would be read back from the disk beside the downloads that write to it.
        """
        reader = self._readers.get(stored.info.number)
        if reader is None or not reader.on_its_way:
            return range(stored.info.chunk_count)
        readers = sum(one.on_its_way for one in self._readers.values())
        return range(reader.cursor, reader.cursor + max(2, self._buffers // readers))

    def _next_of_readers(self) -> Run | None:
        for number in list(self._readers):
            reader = self._readers[number]
            info, reach = reader.stored.info, self._reach(reader.stored)
            if self._whole_files and info.size <= self._most_bytes():
                stop = info.chunk_count
                candidates: Iterable[int] = itertools.chain(range(reader.cursor, stop), range(reader.cursor))
            else:
                stop = min(info.chunk_count, reader.cursor + 1 + reader.window)
                candidates = range(reader.cursor + 1, stop)
            start = next((index for index in candidates if index in reach and self._wanted(reader.stored, index)), None)
            if start is None:
                if reader.stored.complete:
                    del self._readers[number]
                continue
            self._readers.move_to_end(number)
            return self._extend(reader.since, reader.stored, start, stop, of_plan=False)
        return None

    def _next_of_plan(self) -> Run | None:
        later: list[tuple[int, int, _Planned]] = []
        run: Run | None = None
        while self._plan and run is None:
            _, _, planned = self._plan[0]
            stored = self._objects(planned.item.info)
            stop = chunks_of(planned.item.span).stop
            planned.next = next((index for index in range(planned.next, stop) if self._wanted(stored, index)), stop)
            if planned.next == stop:
                heapq.heappop(self._plan)
            elif planned.next not in self._reach(stored):
                later.append(heapq.heappop(self._plan))
            else:
                run = self._extend(planned.since, stored, planned.next, stop, of_plan=True)
                planned.next = run.stop
        for entry in later:
            heapq.heappush(self._plan, entry)
        return run

    def _extend(self, since: float, stored: StoredObject, start: int, stop: int, *, of_plan: bool) -> Run:
        """Return a run from ``start`` over adjacent wanted chunks, shorter when little is left to share out.

        Ahead of a reader whom we serve by copy, all runs together span no more than the buffers, so that
        the reader finds the bytes there.
        """
        longest = MAX_RUN_CHUNKS
        if len(self._plan) <= 1:
            longest = max(1, min(MAX_RUN_CHUNKS, (stop - start) // (2 * self._max_runs) + 1))
        if stored.copied:
            longest = 1
        end = start + 1
        while end < min(stop, start + longest) and self._wanted(stored, end):
            end += 1
        return Run(stored, start, end, demand=False, since=since, planned_stop=end, of_plan=of_plan)
