"""Models by name and version, for programs: the engine of ``modelfs get`` behind a few methods.

    from modelfs import ModelCache

    models = ModelCache("/var/cache/models", "s3://models/{name}/{version}/")
    path = models.get("llama", "v3")

The methods block, for as long as a download takes: call them in a thread where a loop is running. Threads and processes
may share a directory: who comes second waits, and finds the model there.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from urllib.parse import quote

import trio

from modelfs import config as configuration
from modelfs.chunks import Step
from modelfs.errors import CacheBusyError, ConfigError
from modelfs.local import RECORD_NAME, get, store_of
from modelfs.metrics import Metrics
from modelfs.origins.s3_target import S3Target
from modelfs.parallel import start_processes
from modelfs.push import files_of, push
from modelfs.source import parse_source
from modelfs.store.files import STORE_NAME

_NAME = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", re.ASCII)
_WAIT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A complete model; ``used`` is in seconds since the epoch."""

    name: str
    version: str
    path: Path
    files: int
    size_bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What lies in the directory, and what this ``ModelCache`` has done: ``hits`` are ``gets`` that fetched nothing."""

    models: tuple[CachedModel, ...]
    size_bytes: int
    gets: int
    hits: int
    fetched_bytes: int
    evicted: int


class ModelCache:
    """Models of one source in a directory.

    Args:
        directory: Where they are kept; made if missing.
        source: A source with ``{name}`` in it, and ``{version}`` if there are versions.
        max_bytes: Beyond it the models used least recently are removed; 0: no limit. One that a program still has open
            keeps its disk space until it is closed.
        wait_seconds: Longest wait for another process that is fetching the same model.
        options: What ``modelfs get`` takes, by the same names: ``endpoint_url``, ``include``, ``verify``, ...

    Raises:
        ConfigError: The source or an option cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        source: str,
        *,
        max_bytes: int = 0,
        wait_seconds: float = 3600.0,
        **options: str,
    ) -> None:
        self._directory = Path(directory).absolute()
        self._source = source
        self._max_bytes = max_bytes
        self._wait_seconds = wait_seconds
        self._options: Mapping[str, str] = options
        known = {option.name for option in configuration.options()}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(f"unknown option '{unknown[0]}'", "use the names of modelfs get")
        try:
            self._fields = {name for _, name, _, _ in Formatter().parse(source) if name is not None}
        except ValueError:
            self._fields = set()
        if not {"name"} <= self._fields <= {"name", "version"}:
            raise ConfigError(f"'{source}' does not say where models lie", "write s3://BUCKET/{name}/{version}/")
        self._locks: dict[Path, threading.Lock] = {}
        self._lock = threading.Lock()
        self._gets = self._hits = self._fetched_bytes = self._evicted = 0

    def get(self, name: str, version: str = "", *, refresh: bool = True) -> Path:
        """Return the directory of a model, complete and verified; fetch what is missing or has changed.

        Args:
            name: What stands for ``{name}``.
            version: What stands for ``{version}``, where the source has that.
            refresh: Ask the source whether it has changed; without, a complete model is taken as it is.

        Raises:
            ObjectNotFoundError: The source has no such model.
            IntegrityError: A file does not match its publisher's digest.
            ModelfsError: It could not be fetched; what has come stays, for another try.
        """
        path, uri = self._place(name, version)
        with self._lock:
            lock = self._locks.setdefault(path, threading.Lock())
            self._gets += 1
        with lock:
            if refresh or _recorded(path).get("uri") != uri:
                self._fetch(uri, path)
                about = {"name": name, "version": version, "uri": uri}
                (path / STORE_NAME / RECORD_NAME).write_text(json.dumps(about))  # its time is that of the last use
            else:
                with self._lock:
                    self._hits += 1
                os.utime(path / STORE_NAME / RECORD_NAME)
            if self._max_bytes:
                self._make_room(path)
        return path

    def _fetch(self, uri: str, path: Path) -> None:
        config = self._config(uri, store_of(str(path)))
        deadline = time.monotonic() + self._wait_seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        while (fetched_bytes := _try_get(config, path)) is None:
            if time.monotonic() > deadline:
                raise CacheBusyError(f"{path} is in use by another process", "wait for it to end")
            time.sleep(_WAIT_SECONDS)
        with self._lock:
            self._hits += not fetched_bytes
            self._fetched_bytes += fetched_bytes

    def put(self, name: str, version: str, directory: str | os.PathLike[str]) -> None:
        """Bring the files of a directory to where ``get`` finds them; readers see all of them or none.

        Raises:
            ConfigError: The source is no bucket, or there are no files.
            OriginError: It could not be written; what has arrived stays, hidden, for another try.
        """
        _, uri = self._place(name, version)
        source = parse_source(uri)
        if source.scheme != "s3":
            raise ConfigError(f"'{uri}' cannot be written to", "use a source in s3://")
        target = S3Target(source=source, config=self._config(uri).origin, count=Metrics().origin_counter(source.scheme))
        push(files_of(Path(directory)), target, source.prefix, _quiet, delete=True)

    def evict(self, name: str, version: str = "") -> bool:
        """Remove the local copy of a model; return whether there was one."""
        path, _ = self._place(name, version)
        with self._lock:
            lock = self._locks.setdefault(path, threading.Lock())
        with lock:
            return self._remove(path)

    def _remove(self, path: Path) -> bool:
        """Remove a model that no other process is fetching; return whether it is gone through us."""
        try:
            descriptor = os.open(path / STORE_NAME / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
            path.rename(aside)
        except OSError:
            return False  # being fetched, or removed by somebody else
        finally:
            os.close(descriptor)
        shutil.rmtree(aside, ignore_errors=True)
        with self._lock:
            self._evicted += 1
        return True

    def stats(self) -> CacheStats:
        """Return what there is, most recently used first, and what has been done."""
        models = tuple(sorted(self._models(), key=lambda model: -model.used))
        with self._lock:
            counts = (self._gets, self._hits, self._fetched_bytes, self._evicted)
        return CacheStats(models, sum(model.size_bytes for model in models), *counts)

    # -- the directory ------------------------------------------------------------------------------

    def _place(self, name: str, version: str) -> tuple[Path, str]:
        """Return where a model is kept, and where it comes from."""
        for word in filter(None, (name, version)):
            if not _NAME.fullmatch(word):
                raise ConfigError(
                    f"'{word}' cannot be the name or version of a model", "use letters, digits, . _ + - /"
                )
        if not name or bool(version) != ("version" in self._fields):
            raise ConfigError(
                f"'{self._source}' needs {' and '.join(sorted(self._fields))}", "give just these to every call"
            )
        path = self._directory / quote(name, safe="") / (quote(version, safe="") or "main")
        return path, self._source.format(name=name, version=version)

    def _config(self, uri: str, store: configuration.StoreConfig | None = None) -> configuration.Config:
        config = configuration.build([uri], "/", self._options, os.environ)
        return dataclasses.replace(config, store=store) if store is not None else config

    def _models(self) -> list[CachedModel]:
        found = []
        for record in self._directory.glob(f"*/*/{STORE_NAME}/{RECORD_NAME}"):
            path = record.parent.parent
            try:
                about, used = json.loads(record.read_text()), record.stat().st_mtime
                sizes = [one.stat().st_size for one in path.rglob("*") if STORE_NAME not in one.parts and one.is_file()]
                found.append(CachedModel(about["name"], about["version"], path, len(sizes), sum(sizes), used))
            except (OSError, ValueError, KeyError):
                continue  # being removed, or written
        return found

    def _make_room(self, keep: Path) -> None:
        """Remove the models used least recently while there is too much; not one that is being fetched or used now."""
        models = sorted(self._models(), key=lambda model: model.used)
        excess = sum(model.size_bytes for model in models) - self._max_bytes
        for model in models:
            if excess <= 0:
                return
            with self._lock:
                lock = self._locks.setdefault(model.path, threading.Lock())
            if model.path == keep or not lock.acquire(blocking=False):
                continue
            try:
                if self._remove(model.path):
                    excess -= model.size_bytes
            finally:
                lock.release()


def _recorded(path: Path) -> dict[str, str]:
    """Return what a complete model is, or nothing."""
    try:
        found: dict[str, str] = json.loads((path / STORE_NAME / RECORD_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _try_get(config: configuration.Config, path: Path) -> int | None:
    """Fetch a model; return the bytes that came over the network, or ``None`` while another process is at it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path / STORE_NAME / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None  # known before anything is started for it
        finally:
            os.close(descriptor)
    runs, processes = start_processes(config)
    try:
        return trio.run(get, config, str(path), runs, processes, _quiet).fetched_bytes
    except CacheBusyError:
        return None
    finally:
        if processes is not None:
            processes.stop()


def _quiet(what: str, step: Step) -> None:
    """Show nothing."""
