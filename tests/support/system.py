"""Everything between the kernel and the object store, without either: store, engine, eviction, data path.

Runs in a trio thread of its own under a clock that jumps over waits; ``call`` runs things there from outside. Chunks
are small (``small_chunks``), so that a file of many chunks is a matter of microseconds.
"""

import contextlib
import errno
import itertools
import sys
import threading
from collections.abc import Iterator

import trio
import trio.testing

from modelfs.config import Size, StoreConfig, TreeConfig
from modelfs.eviction import Eviction
from modelfs.fetch import Fetch
from modelfs.filesystem import DataPath, View
from modelfs.loads import Loads
from modelfs.memory import Memory
from modelfs.metrics import Metrics
from modelfs.pages import Pages
from modelfs.prefetch import Prefetch
from modelfs.store import Store
from modelfs.traces import Traces
from modelfs.tree import Listing, Tree
from modelfs.verification import Verification
from tests.support.fake_origin import FakeOrigin

CHUNK, PIECE = 16 * 1024, 4 * 1024
BUFFERS = 8
READ_TIMEOUT = 600.0
"""On a clock that jumps whenever nobody has done anything for ``_IDLE_SECONDS``: some seconds."""
_IDLE_SECONDS = 0.01
_CALL_SECONDS = 60


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Make chunks and pieces small wherever the program knows their size, and pauses of the plan short."""
    values = {"CHUNK_BYTES": CHUNK, "PIECE_BYTES": PIECE, "_BACKOFF_SECONDS": (0.001,)}
    modules = [module for name, module in sys.modules.items() if name.startswith("modelfs")]
    before = [(module, name, vars(module)[name]) for module in modules for name in values if name in vars(module)]
    for module, name, _ in before:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class Answer:
    """Takes the one answer to a read; see ``modelfs.fuse.front.Reply``."""

    def __init__(self) -> None:
        self.done = False
        self.bytes: bytes | None = None
        self.errno = 0
        self._token = trio.lowlevel.current_trio_token()
        self.event = trio.Event()

    def data(self, parts) -> None:
        self._take()
        self.bytes = b"".join(parts)
        self._token.run_sync_soon(self.event.set)

    def error(self, code: int) -> None:
        self._take()
        self.errno = code
        self._token.run_sync_soon(self.event.set)

    def _take(self) -> None:
        if self.done:
            raise RuntimeError("answered twice")
        self.done = True


class System:
    """One life of a worker on a cache directory.

    Args:
        home: The cache directory.
        origin: The object store.
        limit: Bytes that the cache may hold.
    """

    def __init__(self, home: str, origin: FakeOrigin, limit: int) -> None:
        self.origin = origin
        self.metrics = Metrics()
        budget = BUFFERS * CHUNK
        config = StoreConfig(home, Size(bytes=limit), Size(bytes=0))
        self.store = Store(config=config, metrics=self.metrics, holder="test", budget=budget)
        self.view = View(self.store, Tree([], TreeConfig()))
        self.fetch = Fetch(
            store=self.store, origins={origin.name: origin}, metrics=self.metrics, budget_bytes=budget,
            memory=Memory(), whole_files=False, on_failed=lambda info, error: None, max_runs=4,
            read_timeout=READ_TIMEOUT,
        )  # fmt: skip
        self.eviction = Eviction(store=self.store, on_room=self.fetch.poke)
        pages = Pages(store=self.store, metrics=self.metrics, available=lambda: 0)
        traces = Traces(store=self.store, origin=None, prefix="")
        prefetch = Prefetch(mode="off", store=self.store, fetch=self.fetch, pages=pages, traces=traces)
        self.verification = Verification(
            mode="off", store=self.store, fetch=self.fetch, ask_store=self._no_digest, tree=lambda: self.view.tree,
            quiet=lambda: True, restarted=False, metrics=self.metrics,
        )  # fmt: skip
        self.data_path = DataPath(
            view=self.view, store=self.store, fetch=self.fetch, prefetch=prefetch, verification=self.verification,
            loads=Loads(), metrics=self.metrics,
        )  # fmt: skip

    async def _no_digest(self, info):
        return None

    async def run(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            for part in (self.store, self.fetch, self.eviction, self.verification, self.data_path):
                await nursery.start(part.run)
            nursery.start_soon(self.store.recover)
            task_status.started()
            await trio.sleep_forever()

    def refresh(self) -> None:
        self.view.tree = Tree([Listing("", ((self.origin.name, ""),), tuple(self.origin.list("")))], TreeConfig())

    async def read(self, inode: int, offset: int, length: int) -> Answer:
        """Read as the kernel does."""
        answer = Answer()
        self.data_path.read(inode, offset, length, answer)
        await answer.event.wait()
        return answer

    async def settle(self) -> None:
        """Wait until nothing is going on, though more may be planned than there is room for.

        Nothing begins before the caller's next checkpoint.
        """
        while True:
            await trio.sleep(0.05)
            async with self.store._commit_lock:
                evicting = any(stored.evicting for stored in self.store._objects.values())  # half out of the books
                if not (evicting or self.fetch.busy or self.verification._wanted or self.verification._current):
                    return


class Life:
    """A system that can be ended, in order or not, and begun again on the same directory."""

    def __init__(self, home: str, origin: FakeOrigin, limit: int) -> None:
        self._arguments = (home, origin, limit)
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self.failure: BaseException | None = None
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(_CALL_SECONDS)
        self.call(self._begin)

    def _run(self) -> None:
        clock = trio.testing.MockClock(autojump_threshold=_IDLE_SECONDS)
        try:
            trio.run(self._main, clock=clock)
        except BaseException as error:  # noqa: BLE001 - handed to whoever looks
            self.failure = error

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._ready.set()
            await trio.sleep_forever()

    async def _begin(self) -> None:
        self.system = System(*self._arguments)
        self._over = trio.Event()
        self._scope = await self._nursery.start(self._live)

    async def _live(self, task_status) -> None:
        system = self.system
        with trio.CancelScope() as scope, contextlib.closing(system.store):
            async with trio.open_nursery() as nursery:
                await nursery.start(system.run)
                system.refresh()
                task_status.started(scope)
        self._over.set()

    async def restart(self, crash: bool) -> None:
        """End this life and begin another one; a crash commits nothing at its end."""
        if crash:
            self.system.store.commit = self._commit_nothing
        self._scope.cancel()
        await self._over.wait()
        await self._begin()

    async def _commit_nothing(self) -> None:
        pass

    def call(self, function, *arguments):
        """Run an async function in the system's loop; return its result.

        Raises:
            TimeoutError: It hangs.
        """
        outcome: list = []

        async def guarded() -> None:
            try:
                outcome.append((await function(*arguments), None))
            except BaseException as error:
                outcome.append((None, error))
                if isinstance(error, trio.Cancelled):
                    raise

        done = threading.Event()

        async def task() -> None:
            try:
                await guarded()
            finally:
                done.set()

        self._token.run_sync_soon(lambda: self._nursery.start_soon(task))
        if not done.wait(_CALL_SECONDS):
            raise TimeoutError(f"{function} hangs")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._token.run_sync_soon(self._nursery.cancel_scope.cancel)
        self._thread.join(_CALL_SECONDS)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure


GONE = {errno.ESTALE, errno.ENOENT}
"""What a read gives of a version that is no more."""
