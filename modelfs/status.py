"""The state of a mount as data: for /v1/status, readiness, ``wait``, ``warm`` and ``why was it slow``.

Computes from store, tree and engine; sends nothing anywhere.
"""

import time
from collections.abc import Callable
from typing import Any

import trio
from prometheus_client import CollectorRegistry, Counter

from modelfs.chunks import ByteRange
from modelfs.config import Config
from modelfs.fetch import Fetch, PlanItem
from modelfs.fuse.tuning import Tuning
from modelfs.loads import Loads
from modelfs.metrics import Metrics
from modelfs.prefetch import RANK_SMALL, SMALL_BYTES, ends, is_weights, plan, wanted_files
from modelfs.store import Store
from modelfs.tree import Directory, File, Tree
from modelfs.verification import state_of

_RATE_WINDOW_SECONDS = 1.0
SKIPPED_REASONS = ("no_room", "disk_full", "disk_error", "slow_disk")
"""Why a chunk was served but not kept."""
FILES_SHOWN = 1000
"""Most files in one status answer; the counts cover all."""


class Status:
    """Answers questions about one mount.

    Args:
        config: What was asked for.
        tuning: Returns what the kernel gives now.
        tree: Returns the current tree.
        store: The store.
        fetch: The engine.
        loads: What engines did.
        metrics: Counters to read.
        mounted_at: When the mount command began, in monotonic seconds.
        starts: How often the worker has been started.
        supervisor_pid: The process to signal for an unmount.
    """

    def __init__(
        self,
        *,
        config: Config,
        tuning: Callable[[], Tuning],
        tree: Callable[[], Tree],
        store: Store,
        fetch: Fetch,
        loads: Loads,
        metrics: Metrics,
        mounted_at: float,
        starts: int,
        supervisor_pid: int,
    ) -> None:
        self._config = config
        self._tuning = tuning
        self._tree = tree
        self._store = store
        self._fetch = fetch
        self._loads = loads
        self._mounted_at = mounted_at
        self._metrics = metrics
        self._starts = starts
        self._supervisor_pid = supervisor_pid
        self._began = time.monotonic()
        self._rates = _Rates()

    def _take_rates(self) -> None:
        """Look at every file's resident bytes, so that rates can be told from the difference."""
        files = self._tree().root.walk()
        self._rates.look(time.monotonic(), {file.inode: self._store.object(file.info).resident_bytes for file in files})

    def file(self, file: File) -> dict[str, Any]:
        """Return one file's state."""
        stored = self._store.object(file.info)
        left = file.info.size - stored.resident_bytes
        state = "complete" if not left else "partial" if stored.resident_bytes else "remote"
        answer: dict[str, Any] = {
            "path": file.path,
            "size": file.info.size,
            "resident": stored.resident_bytes,
            "state": state,
            "digest": state_of(stored),
        }
        if stored.passed or stored.copied:
            answer["in_use"] = "passthrough" if stored.passed else "cached"
        rate = self._rates.of(file.inode)
        if left and rate > 0:
            answer["rate_bytes_per_second"] = round(rate)
            answer["eta_seconds"] = round(left / rate, 1)
        return answer

    def overview(self) -> dict[str, Any]:
        """Return the document of /v1/status."""
        store, tuning = self._store, self._tuning()
        self._take_rates()
        reads = {
            tier: _value(self._metrics.registry, "modelfs_reads_total", tier=tier)
            for tier in ("memory", "store", "origin")
        }
        local = reads["memory"] + reads["store"]
        total = local + reads["origin"]
        return {
            "mountpoint": self._config.mountpoint,
            "pid": self._supervisor_pid,
            "ready_seconds": round(self._began - self._mounted_at, 3),
            "prefetch": self._config.fetch.prefetch,
            "uptime_seconds": round(time.monotonic() - self._began, 1),
            "worker_starts": self._starts,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "kernel": {
                "read_ahead_kib": tuning.read_ahead_kib,
                "max_background": tuning.max_background,
                "passthrough": tuning.passthrough,
                "resend": tuning.resend,
                "hints": tuning.hints(),
            },
            "cache": {
                "directory": str(store.directory),
                "resident_bytes": store.resident_bytes,
                "limit_bytes": store.limit_bytes,
                "evicted_bytes": store.evicted_bytes,
                "skipped_chunks": {
                    reason: int(_value(self._metrics.registry, "modelfs_store_skipped_chunks_total", reason=reason))
                    for reason in SKIPPED_REASONS
                },
                "disk_error": store.disk_error,
            },
            "reads": {
                **{tier: int(count) for tier, count in reads.items()},
                "hit_rate": round(local / total, 4) if total else None,
            },
            "origin": {
                "bytes": _sum(self._metrics.origin_bytes),
                "errors": _sum(self._metrics.origin_errors),
                "rate_bytes_per_second": round(self._rates.total),
            },
            "fetch": self._fetch.statistics(),
            "loads": [load.document(self._mounted_at) for load in self._loads.recent],
            "skipped_keys": dict(self._tree().skipped),
            "sources": [self._source(source.uri, source.name) for source in self._config.sources],
        }

    def _source(self, uri: str, name: str) -> dict[str, Any]:
        top = self._tree().find(name)
        files = list(top.walk()) if isinstance(top, Directory) else []
        rate = sum(self._rates.of(file.inode) for file in files)
        shown = [self.file(file) for file in files[:FILES_SHOWN]]
        size = sum(file.info.size for file in files)
        resident = sum(self._store.object(file.info).resident_bytes for file in files)
        answer: dict[str, Any] = {
            "uri": uri,
            "name": name,
            "files_count": len(files),
            "size": size,
            "resident": resident,
            "state": "complete" if resident == size else "partial" if resident else "remote",
            "rate_bytes_per_second": round(rate),
            "files": shown,
        }
        if resident < size and rate > 0:
            answer["eta_seconds"] = round((size - resident) / rate, 1)
        return answer

    def readiness(self, path: str, *, every: bool = False) -> dict[str, Any] | None:
        """Return how much of ``path`` is local, or ``None`` if there is no such path.

        Args:
            path: Relative to the mount; empty for all of it.
            every: Count every file below, not only those a start reads.
        """
        tree = self._tree()
        node = tree.find(path)
        if node is None:
            return None
        files = tree.under(path) if every else wanted_files(node)
        size = sum(file.info.size for file in files)
        resident = sum(self._store.object(file.info).resident_bytes for file in files)
        return {
            "path": path,
            "files_count": len(files),
            "size": size,
            "resident": resident,
            "share": resident / size if size else 1.0,
            "heads": all(self._heads_local(file) for file in files),
            "complete": resident == size,
        }

    def _heads_local(self, file: File) -> bool:
        if not file.info.size:
            return True
        stored = self._store.object(file.info)
        if file.info.size <= SMALL_BYTES and not is_weights(file.name):
            return stored.complete
        return not is_weights(file.name) or all(not stored.missing(span) for span in ends(file.info))

    def want(self, path: str) -> dict[str, Any]:
        """Plan the download of what a start from ``path`` reads, in the order it reads it."""
        node = self._tree().find(path)
        if node is not None:
            for entry in plan(wanted_files(node)):
                self._fetch.submit([entry.item], entry.rank)
        return {"found": node is not None}

    def warm(self, paths: list[str]) -> dict[str, Any]:
        """Plan the download of everything under ``paths``; return what was found."""
        tree = self._tree()
        missing = [path for path in paths if tree.find(path) is None]
        files = [] if missing else [file for path in paths for file in tree.under(path)]
        self._fetch.submit(
            (PlanItem(file.info, ByteRange(0, file.info.size)) for file in files if file.info.size), RANK_SMALL
        )
        return {"missing": missing, "files_count": len(files), "size": sum(file.info.size for file in files)}


class _Rates:
    """Bytes per second that files grew by, between two looks at least a second apart."""

    def __init__(self) -> None:
        self._then = 0.0
        self._resident: dict[int, int] = {}
        self._rates: dict[int, float] = {}

    def look(self, now: float, resident: dict[int, int]) -> None:
        """Take notice of the resident bytes of all files at ``now`` (seconds, monotonic)."""
        elapsed = now - self._then
        if elapsed < _RATE_WINDOW_SECONDS:
            return
        grown = {number: size - self._resident.get(number, size) for number, size in resident.items()}
        self._rates = {number: size / elapsed for number, size in grown.items() if size > 0}
        self._then, self._resident = now, resident

    def of(self, number: int) -> float:
        """Return one file's rate."""
        return self._rates.get(number, 0.0)

    @property
    def total(self) -> float:
        """The rate of all files."""
        return sum(self._rates.values())


def _sum(counter: Counter) -> int:
    """Return a counter's value over all its labels."""
    samples = (sample for family in counter.collect() for sample in family.samples)
    return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))


def _value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0
