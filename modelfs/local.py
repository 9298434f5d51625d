"""Files without a mount: the sources, the engine and the store of one, and a plain directory at the end.

``get`` keeps its store in ``.modelfs`` inside the directory; the files beside it are hard links to the store's, so that
nothing lies on the disk twice and another ``get`` knows what is there. Only what is complete, and not known to be bad,
gets its name; what a source has no longer loses it. Owned by a trio loop.
"""

import contextlib
import json
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from modelfs.chunks import MIB, ByteRange, ObjectInfo, Step
from modelfs.config import Config, Size, StoreConfig
from modelfs.digests import BAD, VERIFIED, Digest
from modelfs.errors import CacheError, IntegrityError, ModelfsError, OriginError, ReadTimeoutError
from modelfs.fetch import Fetch, PlanItem, default_budget
from modelfs.memory import Memory, available_memory
from modelfs.metrics import Metrics
from modelfs.prefetch import RANK_SMALL, RANK_WEIGHTS, SMALL_BYTES
from modelfs.sources import Sources
from modelfs.store import Store
from modelfs.store.files import STORE_NAME
from modelfs.tree import File, Tree
from modelfs.verification import Verification

if TYPE_CHECKING:
    from modelfs.origins.remote import Processes

log = logging.getLogger(__name__)

PLACED_NAME = "placed.json"
"""In the store: which names in the directory are whose."""
RECORD_NAME = "model.json"
"""In the store: what ``ModelCache`` calls it; there only while all names are of one listing."""
ROUNDS = 3
"""How often files that a disk has damaged are fetched again."""
_POLL_SECONDS = 0.1
_PAGE = 64


Show = Callable[[str, Step], None]
"""Takes what is going on, and how far it has come."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a ``get`` did: ``fetched_bytes`` is what came over the network."""

    files: int
    size_bytes: int
    fetched_bytes: int
    removed_files: int


def store_of(directory: str) -> StoreConfig:
    """Return the store inside ``directory``: as large as it has to be."""
    return StoreConfig(
        cache_dir=str(Path(directory).absolute() / STORE_NAME), cache_size=Size(share=1.0), min_free=Size()
    )


class Local:
    """The files of some sources, as far as they are in a store.

    Args:
        config: Sources, store, limits.
        runs: Most downloads at once.
        processes: Do what concerns the object stores, or ``None`` for threads of ours.

    Raises:
        ModelfsError: A place or the store cannot be used as configured.
    """

    def __init__(self, config: Config, runs: int, processes: "Processes | None") -> None:
        self._config = config
        self.metrics = Metrics()
        self._sources = Sources(config, self.metrics, processes)
        budget = config.fetch.max_memory.of(available_memory()) or default_budget(available_memory(), runs)
        self.store = Store(
            config=config.store, metrics=self.metrics, holder=f"modelfs, pid {os.getpid()}", budget=budget
        )
        self._failure: OriginError | None = None
        self._failed_at = 0.0
        self.fetch = Fetch(
            store=self.store,
            origins=self._sources.by_name,
            metrics=self.metrics,
            budget_bytes=budget,
            memory=processes.memory if processes is not None else Memory(),
            whole_files=False,
            on_failed=self._note_failure,
            max_runs=runs,
            read_timeout=config.fetch.read_timeout,
        )
        self.tree = Tree([], config.tree)
        self._verification = Verification(
            mode="off",  # nothing by itself
            store=self.store,
            fetch=self.fetch,
            ask_store=self._ask_store,
            tree=lambda: self.tree,
            quiet=lambda: True,
            restarted=False,
            metrics=self.metrics,
        )

    def _note_failure(self, info: ObjectInfo, error: OriginError) -> None:
        self._failure = error

    async def _ask_store(self, info: ObjectInfo) -> Digest | None:
        origin = self._sources.by_name.get(info.id.origin)
        return await trio.to_thread.run_sync(origin.digest, info) if origin else None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Local"]:
        """List the sources, and run engine and store while in the block.

        Raises:
            OriginError: A listing failed.
        """
        with contextlib.closing(self.store):
            self.tree = self._sources.tree(await self._sources.refresh())
            async with trio.open_nursery() as nursery:
                await nursery.start(self.store.run)
                await nursery.start(self.fetch.run)
                await nursery.start(self._verification.run)
                yield self
                nursery.cancel_scope.cancel()

    # -- downloading --------------------------------------------------------------------------------

    def files(self) -> list[File]:
        """Return what is to be fetched."""
        # A hostile key must not become a part of the store.
        return [file for file in self.tree.root.walk() if file.path.partition("/")[0] != STORE_NAME]

    async def download(self, show: Show, *, evicts: bool) -> None:
        """Bring every file into the store.

        Args:
            show: Told how far it has come.
            evicts: Other files may make room. Not where files have names beside the store: these are links.

        Raises:
            CacheError: There is no room.
            ModelfsError: A file cannot be had, or nothing came for as long as a read would wait.
        """
        stored = [self.store.object(file.info) for file in self.files()]
        total = sum(one.info.size for one in stored)
        self._check_room(total, sum(one.resident_bytes for one in stored))
        if evicts:
            await self._make_room(
                {one.info.number for one in stored}, total - sum(one.resident_bytes for one in stored)
            )
        for one in stored:
            self.store.touch(one, range(0))
            if not one.complete:
                rank = RANK_SMALL if one.info.size <= SMALL_BYTES else RANK_WEIGHTS
                self.fetch.submit([PlanItem(one.info, ByteRange(0, one.info.size))], rank)

        def look() -> Step:
            done = sum(one.resident_bytes for one in stored)
            return Step(done, total, done == total, (done, self.fetch.received_bytes))

        await self._follow("get", show, look)
        await self.store.commit()

    async def _follow(self, what: str, show: Show, look: Callable[[], Step]) -> None:
        """Show the work that ``look`` reports until it is finished."""
        seen: object = None
        since = time.monotonic()
        while True:
            step = look()
            show(what, step)
            if step.finished:
                return
            if step.mark != seen:
                seen, since = step.mark, time.monotonic()
            self._check_progress(since)
            await trio.sleep(_POLL_SECONDS)

    def _check_progress(self, since: float) -> None:
        """Raise if a failure will not pass, or nothing has come for too long."""
        if self._failure is not None and not self._failure.retryable:
            raise self._failure
        if time.monotonic() - since > self._config.fetch.read_timeout:
            if self.store.disk_error:
                raise CacheError(f"{self.store.directory} cannot be written ({self.store.disk_error})", "mend the disk")
            if self._failure is not None:
                raise self._failure
            raise ReadTimeoutError(
                f"nothing came for {self._config.fetch.read_timeout:.0f} s",
                "check the network, or raise --read-timeout",
            )

    def _check_room(self, total: int, there: int) -> None:
        room = self.store.limit_bytes - self.store.headroom_bytes
        if there < total > room:
            raise CacheError(
                f"{total // MIB} MiB do not fit into {self.store.directory}: it may hold {max(0, room) // MIB} MiB",
                "free space, raise --cache-size, or leave files out with --include and --exclude",
            )

    async def _make_room(self, kept: set[int], missing: int) -> None:
        """Evict what was used least recently, but for the ``kept`` objects, until the ``missing`` bytes have room."""
        store, after = self.store, (0, 0)
        excess = store.resident_bytes + missing - (store.limit_bytes - store.headroom_bytes)
        while excess > 0 and (page := store.least_recent(_PAGE, after)):
            for after in page:
                other = store.evictable(after[1]) if excess > 0 and after[1] not in kept else None
                if other is not None:
                    excess -= await store.evict(other, list(other.chunks), "limit")

    async def verify(self, show: Show) -> None:
        """Compare every file that has not been compared yet, or has been written since, with its digest.

        Raises:
            IntegrityError: A file differs, also after it was fetched once more.
            ModelfsError: A file cannot be fetched once more.
        """
        self._verification.check("", anew=False)
        report: dict[str, Any] = {}

        def look() -> Step:
            nonlocal report
            report = self._verification.report("")
            waiting = report["counts"]["pending"] + report["awaited"]
            mark = (report["hashed"], report["resident"], waiting, self.fetch.received_bytes)
            return Step(report["hashed"], report["size"], not waiting, mark)

        await self._follow("verify", show, look)
        if report["counts"][BAD]:
            names = [file["path"] for file in report["details"] if file["state"] == BAD]
            raise IntegrityError(
                f"{len(names)} files do not match their digest: {', '.join(names[:5])}", "upload them again"
            )
        log.info("%d files verified, of %d", report["counts"][VERIFIED], sum(report["counts"].values()))

    @property
    def complete(self) -> bool:
        """Whether every byte of every file is in the store."""
        return all(self.store.object(file.info).complete for file in self.files())

    # -- the directory ------------------------------------------------------------------------------

    async def place(self, directory: Path) -> int:
        """Give every file its name in ``directory``; return how many names were taken away.

        Raises:
            CacheError: The directory cannot be written.
        """
        files = {file.path: file.info for file in self.files()}
        try:
            gone, named = await trio.to_thread.run_sync(self._place_sync, directory, files)
        except OSError as error:
            raise CacheError(
                f"{error.filename or directory} cannot be written ({error.strerror})", "choose another directory"
            ) from error
        for number in self.store.numbers() - named:
            stored = self.store.evictable(number)
            if stored is not None:
                await self.store.evict(stored, list(stored.chunks), "replaced", force=True)
        return gone

    def _place_sync(self, directory: Path, files: dict[str, ObjectInfo]) -> tuple[int, set[int]]:
        """Link; return how many names were taken away, and the numbers of objects that have one.

        The record has old and new names until all are made: whoever comes after a crash knows which are ours.
        """
        home = self.store.directory
        before, now = _read_record(home / PLACED_NAME), {path: info.number for path, info in files.items()}
        new = [path for path, info in files.items() if not _is_link(directory / path, self.store.data_path(info), info)]
        lost = [path for path in before if now.get(path) != before[path]]
        if new or lost:
            (home / RECORD_NAME).unlink(missing_ok=True)
            _write_record(home / PLACED_NAME, {**now, **{path: before[path] for path in lost if path not in now}})
        gone = 0
        for path in lost:
            if path not in now:
                _unlink_ours(directory / path, self.store.data_directory / f"{before[path]:016x}")
                gone += 1
        mode = 0o666 & ~_umask()
        for path in new:
            _link(self.store.data_path(files[path]), directory, path, files[path].size, mode, home / "linked")
        _write_record(home / PLACED_NAME, now)
        return gone, set(now.values())


def _read_record(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
        return {str(name): int(number) for name, number in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # the first time, or broken off: what is ours is found again by its link


def _write_record(path: Path, names: dict[str, int]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(names))
    temporary.rename(path)


def _umask() -> int:
    """Return the process's umask; asking the system call for it would change it for other threads."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o022)


def _is_link(target: Path, data: Path, info: ObjectInfo) -> bool:
    """Return whether ``target`` is the file already, and not by way of a link that somebody made."""
    try:
        found = target.lstat()
        if not info.size:
            return stat.S_ISREG(found.st_mode) and not found.st_size
        return os.path.samestat(found, data.lstat())
    except OSError:
        return False


def _link(data: Path, directory: Path, path: str, size: int, mode: int, temporary: Path) -> None:
    """Make ``path`` in ``directory`` a name of the data file, in one step; never through a link in between.

    Raises:
        CacheError: Something else stands in its way.
    """
    parent = directory
    parent.mkdir(parents=True, exist_ok=True)
    for part in path.split("/")[:-1]:
        parent = parent / part
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            raise CacheError(f"{parent} is no directory", "remove it, or choose another directory")
        parent.mkdir(exist_ok=True)
    temporary.unlink(missing_ok=True)
    if size:
        data.chmod(mode)
        temporary.hardlink_to(data)
    else:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode))
    temporary.rename(directory / path)


def _unlink_ours(target: Path, data: Path) -> None:
    """Remove a name that is still the data file's, and directories that are empty without it; no more."""
    try:
        ours = os.path.samestat(target.lstat(), data.lstat())
    except OSError:
        return
    if ours:
        target.unlink()
        with contextlib.suppress(OSError):
            target.parent.rmdir()


async def get(config: Config, directory: str | None, runs: int, processes: "Processes | None", show: Show) -> Result:
    """Bring the sources' files into the store of ``config``, verified, and give them names in ``directory`` if any.

    Raises:
        ModelfsError: It could not be done; what is there already stays for another try.
    """
    local = Local(config, runs, processes)
    failure: ModelfsError | None = None
    removed = 0
    async with local.running():
        try:
            for _ in range(ROUNDS):
                await local.download(show, evicts=directory is None)
                if config.fetch.verify != "off":
                    await local.verify(show)
                if local.complete:
                    break
            else:
                raise CacheError(f"{local.store.directory} damages what is written to it", "check the disk")
            if directory is not None:
                removed = await local.place(Path(directory))
        except ModelfsError as error:
            failure = error  # not through the nursery, which would wrap it
    if failure is not None:
        raise failure
    return Result(
        len(local.files()), sum(file.info.size for file in local.files()), int(local.fetch.received_bytes), removed
    )
