"""The worker: builds every part, opens the one root nursery, talks to the supervisor.

Started by ``modelfs.worker``. Order: open the store, list the sources, begin to download, say ``prepared``, receive
the kernel descriptor, serve. What is not needed before the first download is imported after it. A restarted worker
begins with the listing saved in the store, so that it answers even while the bucket is away, and refreshes
afterwards.
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import pyfuse3
import trio

from modelfs.chunks import ObjectInfo
from modelfs.config import Config
from modelfs.digests import Digest
from modelfs.errors import CacheError, ModelfsError, ObjectChangedError, ObjectNotFoundError, OriginError
from modelfs.eviction import Eviction
from modelfs.fetch import Fetch, default_budget
from modelfs.filesystem import DataPath, Namespace, View
from modelfs.fuse import protocol
from modelfs.fuse.front import Front
from modelfs.fuse.opens import OpenTable
from modelfs.fuse.supervisor import BEAT_SECONDS
from modelfs.fuse.tuning import Tuning, control_socket
from modelfs.loads import Load, Loads
from modelfs.memory import Memory, available_memory
from modelfs.metrics import Metrics
from modelfs.pages import Pages
from modelfs.prefetch import Prefetch, model_files
from modelfs.source import parse_source
from modelfs.sources import Sources
from modelfs.status import Status
from modelfs.store import Store
from modelfs.traces import Traces
from modelfs.tree import Directory, Listing
from modelfs.verification import Verification

if TYPE_CHECKING:
    from modelfs.admin import Admin
    from modelfs.origins.remote import Processes

log = logging.getLogger(__name__)

MAX_TASKS = 1024
"""Namespace requests at once; with pyfuse3's 99, blocked ones stall every lookup."""
QUIET_SECONDS = 30.0
"""After so long without an open or a read, hashing files is in nobody's way."""
_REFRESH_PAUSE_SECONDS = 1.0


def _memory_directory() -> str | None:
    """Return a directory in memory, or ``None`` for the usual one of temporary files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


class Worker:
    """One life of the worker.

    Args:
        channel: The socket to the supervisor.
        start: The start message.
        processes: Do what concerns the object stores, or ``None`` for threads of ours.
        runs: Most downloads at once.
    """

    def __init__(self, channel: socket.socket, start: dict[str, Any], processes: "Processes | None", runs: int) -> None:
        self._channel = channel
        self._runs = runs
        self._processes = processes
        self._start = start
        self._config = Config.from_json(start["config"])
        self._metrics = Metrics()
        self._metrics.worker_starts.set(start["starts"])
        self._refresh_wanted = trio.Event()

    async def run(self) -> None:
        """Serve until unmounted or told to stop.

        Raises:
            ModelfsError: Serving could not begin.
        """
        config = self._config
        budget = config.fetch.max_memory.of(available_memory()) or default_budget(available_memory(), self._runs)
        self._sources = Sources(config, self._metrics, self._processes)
        with self._open_store(f"modelfs mount at {config.mountpoint}", budget) as store:
            self._store = store
            self._listings = await self._first_listings()
            self._view = View(store, self._sources.tree(self._listings))
            prefetching = config.fetch.prefetch != "off"
            self._fetch = Fetch(
                store=store,
                origins=self._sources.by_name,
                metrics=self._metrics,
                budget_bytes=budget,
                memory=self._processes.memory if self._processes is not None else Memory(),
                whole_files=prefetching,
                on_failed=self._download_failed,
                max_runs=self._runs,
                read_timeout=config.fetch.read_timeout,
            )
            self._pages = Pages(store=store, metrics=self._metrics, available=available_memory)
            self._loads = Loads()
            self._traces = self._make_traces()
            self._prefetch = Prefetch(
                mode=config.fetch.prefetch, store=store, fetch=self._fetch, pages=self._pages, traces=self._traces
            )
            await self._serve()

    def _download_failed(self, info: ObjectInfo, error: OriginError) -> None:
        if isinstance(error, ObjectChangedError | ObjectNotFoundError):
            self._refresh_wanted.set()

    @contextlib.contextmanager
    def _open_store(self, holder: str, budget: int) -> Iterator[Store]:
        """Open the store; where readers wait already and it cannot be used, one that keeps nothing.

        Raises:
            CacheError: It cannot be used, and the mount is only being made.
        """
        config, failure = self._config.store, ""
        store = None
        if not self._start["without_cache"]:
            try:
                store = Store(config=config, metrics=self._metrics, holder=holder, budget=budget)
                if not self._start["mounted"]:
                    store.check_room()
            except (CacheError, OSError, lmdb.Error) as error:
                if not self._start["mounted"]:
                    raise
                failure = str(error)
        with contextlib.ExitStack() as stack:
            if store is None:
                import tempfile  # noqa: PLC0415 - hardly ever needed

                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelfs-", dir=_memory_directory()))
                log.error(
                    "the mount goes on without its cache until it is made anew: %s", failure or "it ended workers"
                )
                config = dataclasses.replace(config, cache_dir=directory)
                store = Store(config=config, metrics=self._metrics, holder=holder, budget=budget, keeps=False)
                if failure:
                    store.take_listings(Path(self._config.store.cache_dir), self._sources.names())
                store.disk_error = failure or "workers ended before they could use it"
            yield stack.enter_context(contextlib.closing(store))

    # -- sources ------------------------------------------------------------------------------------

    def _make_traces(self) -> Traces:
        uri = self._config.fetch.trace_uri
        if not uri:
            return Traces(store=self._store, origin=None, prefix="")
        source = parse_source(uri)
        origin = self._sources.origin(source.place)
        return Traces(store=self._store, origin=origin, prefix=source.prefix)

    async def _keep_trace(self, load: Load) -> None:
        """Keep the order of a load that waited for the origin, if the model is still what it was."""
        trace, directory = load.trace(), self._view.tree.find(load.model)
        if trace is None or not isinstance(directory, Directory):
            return
        infos = [file.info for file in model_files(directory)]
        if trace.spans({info.id: info for info in infos}) is not None:
            await self._traces.keep(infos, trace)

    async def _first_listings(self) -> list[Listing]:
        if self._start["mounted"]:
            saved = self._sources.saved(self._store)
            if saved:
                self._refresh_wanted.set()
                return saved
        try:
            return await self._sources.refresh(self._store)
        except OriginError as error:
            saved = self._sources.saved(self._store) if self._config.tree.immutable and error.retryable else []
            if not saved:
                raise
            log.warning("mounting what was listed before: %s", error)
            return saved

    async def _keep_fresh(self) -> None:
        """List again at the configured interval, or soon after an object turned out to have changed."""
        if self._config.tree.immutable:
            return
        interval = self._config.tree.refresh or float("inf")
        while True:
            with trio.move_on_after(interval):
                await self._refresh_wanted.wait()
            self._refresh_wanted = trio.Event()
            await self._refresh()
            await trio.sleep(_REFRESH_PAUSE_SECONDS)

    async def _refresh(self) -> None:
        try:
            listings = await self._sources.refresh(self._store)
        except OriginError as error:
            log.warning("the listing could not be refreshed, the last one stays: %s", error)
            return
        if all(now is before for now, before in zip(listings, self._listings, strict=True)):
            return
        self._listings = listings
        tree = self._sources.tree(listings)
        changed = tree.nodes.keys() != self._view.tree.nodes.keys()
        self._view.tree = tree
        if changed:
            log.info("the listing changed: %d files", tree.file_count)
            self._prefetch.start(tree)
            self._verification.look_again()

    # -- serving ------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_on_signal, nursery.cancel_scope)
            await nursery.start(self._store.run)
            await nursery.start(self._fetch.run)
            await nursery.start(self._pages.run)
            await nursery.start(self._prefetch.run)
            await nursery.start(self._loads.run, self._keep_trace)
            self._prefetch.start(self._view.tree)
            await self._serve_kernel(nursery)

    async def _serve_kernel(self, nursery: trio.Nursery) -> None:
        self._say({"prepared": True})
        connect, descriptors = await self._receive_connect()
        descriptor, table = descriptors
        opens = OpenTable(table)
        tuning = Tuning(**connect["tuning"])
        self._verification = self._make_verification()
        data_path = DataPath(
            view=self._view,
            store=self._store,
            fetch=self._fetch,
            prefetch=self._prefetch,
            verification=self._verification,
            loads=self._loads,
            metrics=self._metrics,
        )
        front = Front(
            descriptor=descriptor, opens=opens, handler=data_path, metrics=self._metrics, passthrough=tuning.passthrough
        )
        front.restore()
        # Not before it is known what a kernel reads that was served by the worker before us.
        await nursery.start(Eviction(store=self._store, on_room=self._fetch.poke).run)
        namespace = Namespace(
            view=self._view,
            config=self._config.tree,
            store=self._store,
            prefetch=self._prefetch,
            metrics=self._metrics,
        )
        pyfuse3.init(namespace, front.namespace_path, set(pyfuse3.default_options))
        try:
            async with trio.open_nursery() as inner:
                await inner.start(data_path.run)
                await inner.start(self._admin(lambda: dataclasses.replace(tuning, passthrough=front.passthrough)).run)
                if self._config.daemon.engine_metrics:
                    inner.start_soon(self._watch_engine, self._config.daemon.engine_metrics)
                await inner.start(self._verification.run)
                inner.start_soon(self._run_namespace)
                if self._start["mounted"] and connect["resend"]:
                    os.write(descriptor, protocol.resend_notification())
                inner.start_soon(self._run_front, front, nursery.cancel_scope)
                self._say({"serving": True})
                log.info("serving %d files at %s", self._view.tree.file_count, self._config.mountpoint)
                inner.start_soon(self._keep_fresh)
                inner.start_soon(self._beat)
                inner.start_soon(self._store.recover)
        finally:
            pyfuse3.close(unmount=False)

    def _make_verification(self) -> Verification:
        async def ask_store(info: ObjectInfo) -> Digest | None:
            origin = self._sources.by_name.get(info.id.origin)
            return await trio.to_thread.run_sync(origin.digest, info) if origin else None

        return Verification(
            mode=self._config.fetch.verify,
            store=self._store,
            fetch=self._fetch,
            ask_store=ask_store,
            tree=lambda: self._view.tree,
            restarted=self._start["mounted"],
            quiet=lambda: not self._fetch.busy and time.monotonic() > self._loads.last + QUIET_SECONDS,
            metrics=self._metrics,
        )

    def _verify(self, path: str, *, begin: bool) -> dict[str, Any]:
        if self._view.tree.find(path) is None:
            return {"missing": True}
        if begin:
            self._verification.check(path)
        return self._verification.report(path)

    async def _evict(self, path: str) -> dict[str, Any]:
        """Remove what is local under ``path`` and not open; tell where the objects lie and how they are reached."""
        if self._view.tree.find(path) is None:
            return {"missing": True}
        freed = in_use = 0
        uris = []
        for file in self._view.tree.under(path):
            stored = self._store.object(file.info)
            uris.append(f"{file.info.id.origin.partition('@')[0]}/{file.info.id.key}")
            in_use += bool(stored.users)
            if not stored.users:
                freed += await self._store.evict(stored, list(stored.chunks), "asked")
        return {
            "freed_bytes": freed,
            "in_use_files": in_use,
            "uris": uris,
            "origin": dataclasses.asdict(self._config.origin),
        }

    async def _watch_engine(self, url: str) -> None:
        from modelfs.engine import Engine  # noqa: PLC0415 - few need it

        await Engine(url=url, loads=self._loads).run()

    def _admin(self, tuning: Callable[[], Tuning]) -> "Admin":
        from modelfs.admin import Admin, Answers  # noqa: PLC0415 - downloads have begun by now

        status = Status(
            config=self._config,
            tuning=tuning,
            tree=lambda: self._view.tree,
            store=self._store,
            fetch=self._fetch,
            loads=self._loads,
            metrics=self._metrics,
            mounted_at=self._start["began"],
            starts=self._start["starts"],
            supervisor_pid=self._start["supervisor_pid"],
        )

        async def control(command: str, data: dict[str, Any]) -> dict[str, Any] | None:
            paths = data.get("paths")
            if command == "warm" and isinstance(paths, list) and all(isinstance(path, str) for path in paths):
                return status.warm(paths)
            path = data.get("path")
            if command == "want" and isinstance(path, str):
                return status.want(path)
            if command == "evict" and isinstance(path, str):
                return await self._evict(path)
            if command in {"verify", "verified"} and isinstance(path, str):
                return self._verify(path, begin=command == "verify")
            return None

        answers = Answers(
            registry=self._metrics.registry,
            status=status.overview,
            readiness=lambda path, every: status.readiness(path, every=every),
            control=control,
        )
        return Admin(
            answers=answers, address=self._config.daemon.admin, socket_path=control_socket(self._config.mountpoint)
        )

    async def _run_namespace(self) -> None:
        await pyfuse3.main(max_tasks=MAX_TASKS)

    async def _run_front(self, front: Front, scope: trio.CancelScope) -> None:
        await front.run()
        self._say({"unmounted": True})
        scope.cancel()

    async def _stop_on_signal(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                scope.cancel()
                return

    # -- the supervisor -----------------------------------------------------------------------------

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode())

    async def _beat(self) -> None:
        while True:
            self._say({"beat": True})
            await trio.sleep(BEAT_SECONDS)

    async def _receive_connect(self) -> tuple[dict[str, Any], list[int]]:
        data, descriptors, _, _ = await trio.to_thread.run_sync(
            lambda: socket.recv_fds(self._channel, 65536, 2), abandon_on_cancel=True
        )
        if len(descriptors) != 2:
            raise ModelfsError("the supervisor ended before the mount was made")
        return json.loads(data)["connect"], descriptors


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def serve(channel: socket.socket, start: dict[str, Any], processes: "Processes | None", runs: int) -> int:
    """Be the worker on the supervisor's socket until the end; return the exit code. See ``Worker``."""
    worker = Worker(channel, start, processes, runs)
    try:
        trio.run(worker.run)
    except ModelfsError as error:
        return _fail(channel, str(error), error.exit_code)
    except BaseExceptionGroup as group:
        known = [error for error in _leaves(group) if isinstance(error, ModelfsError)]
        if known:
            return _fail(channel, str(known[0]), known[0].exit_code)
        log.exception("the worker ends on an unexpected error")
        return 1
    return 0


def _fail(channel: socket.socket, line: str, exit_code: int) -> int:
    with contextlib.suppress(OSError):
        channel.send(json.dumps({"failed": {"line": line, "exit_code": exit_code}}).encode())
    return exit_code
