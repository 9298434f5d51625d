"""The state of a mount as data: for /v1/status, readiness, ``wait``, ``warm`` and ``why was it slow``.

Computes from store, tree and engine; sends nothing anywhere.
"""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry

from modelfs.chunks import ByteRange
from modelfs.config import Config
from modelfs.fetch import Fetch, PlanItem
from modelfs.fuse.tuning import Tuning
from modelfs.metrics import Metrics
from modelfs.prefetch import RANK_SMALL, SMALL_BYTES, ends, is_weights, plan, wanted_files
from modelfs.store import Store
from modelfs.tree import Directory, File, Tree

_RATE_WINDOW_SECONDS = 1.0
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
        metrics: Counters to read.
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
        metrics: Metrics,
        starts: int,
        supervisor_pid: int,
    ) -> None:
        self._config = config
        self._tuning = tuning
        self._tree = tree
        self._store = store
        self._fetch = fetch
        self._metrics = metrics
        self._starts = starts
        self._supervisor_pid = supervisor_pid
        self._began = time.monotonic()
        self._rate = (time.monotonic(), 0, 0.0)

    def rate(self) -> float:
        """Return the origin's recent rate in bytes per second."""
        then, bytes_then, rate = self._rate
        now, received = time.monotonic(), self._fetch.received_bytes
        if now - then >= _RATE_WINDOW_SECONDS:
            rate = (received - bytes_then) / (now - then)
            self._rate = (now, received, rate)
        return rate

    def file(self, file: File, rate: float) -> dict[str, Any]:
        """Return one file's state."""
        stored = self._store.object(file.info)
        left = file.info.size - stored.resident_bytes
        state = "complete" if not left else "partial" if stored.resident_bytes else "remote"
        answer: dict[str, Any] = {
            "path": file.path,
            "size": file.info.size,
            "resident": stored.resident_bytes,
            "state": state,
        }
        if stored.users:
            answer["in_use"] = "passthrough" if stored.passed else "cached"
        if left and rate > 0:
            answer["eta_seconds"] = round(left / rate, 1)
        return answer

    def overview(self) -> dict[str, Any]:
        """Return the document of /v1/status."""
        store, rate, tuning = self._store, self.rate(), self._tuning()
        reads = {
            tier: _value(self._metrics.registry, "modelfs_reads_total", tier=tier)
            for tier in ("memory", "store", "origin")
        }
        local = reads["memory"] + reads["store"]
        total = local + reads["origin"]
        return {
            "mountpoint": self._config.mountpoint,
            "pid": self._supervisor_pid,
            "uptime_seconds": round(time.monotonic() - self._began, 1),
            "worker_starts": self._starts,
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
            },
            "reads": {
                **{tier: int(count) for tier, count in reads.items()},
                "hit_rate": round(local / total, 4) if total else None,
            },
            "origin": {
                "bytes": int(_value(self._metrics.registry, "modelfs_origin_bytes_total")),
                "rate_bytes_per_second": round(rate),
            },
            "fetch": self._fetch.statistics(),
            "skipped_keys": dict(self._tree().skipped),
            "sources": [self._source(source.uri, source.name, rate) for source in self._config.sources],
        }

    def _source(self, uri: str, name: str, rate: float) -> dict[str, Any]:
        top = self._tree().find(name)
        files = list(top.walk()) if isinstance(top, Directory) else []
        shown = [self.file(file, rate) for file in files[:FILES_SHOWN]]
        size = sum(file.info.size for file in files)
        resident = sum(self._store.object(file.info).resident_bytes for file in files)
        answer: dict[str, Any] = {
            "uri": uri,
            "name": name,
            "files_count": len(files),
            "size": size,
            "resident": resident,
            "state": "complete" if resident == size else "partial" if resident else "remote",
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
            "rate_bytes_per_second": round(self.rate()),
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


def _value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0
