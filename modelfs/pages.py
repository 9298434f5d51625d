"""Complete files go into the kernel's page cache before the engine asks for them.

Chunks are written around the page cache, so a file that has just arrived, like one of a warm store, would be
read from disk when the engine comes to it. Engines spend seconds on imports first: enough to have the files
in memory by then, in load order. Only files that the kernel reads without us (passthrough) gain by it; pages
of others would lie in memory twice.

Bound: half of the memory that is available when a model is wanted; more would push out what was loaded first,
before the engine comes to it. The pages are the kernel's to
reclaim. Knows the store, and not why a file is wanted.
"""

import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable

import trio

from modelfs.chunks import CHUNK_BYTES
from modelfs.metrics import Metrics
from modelfs.store import Store, StoredObject
from modelfs.threads import in_background

log = logging.getLogger(__name__)


class Pages:
    """Loads files in the order in which they were wanted.

    Args:
        store: Where the files are.
        metrics: Counts loaded bytes.
        available: Returns the bytes of memory that may be taken now.
    """

    def __init__(self, *, store: Store, metrics: Metrics, available: Callable[[], int]) -> None:
        self._store = store
        self._metrics = metrics
        self._available = available
        self._wanted: deque[StoredObject] = deque()
        self._budget = 0
        self._work = trio.Event()

    def want(self, model: Iterable[StoredObject]) -> None:
        """Load these files, each as soon as it is complete, until half of the available memory is used."""
        self._budget = self._available() // 2
        self._wanted.extend(stored for stored in model if stored not in self._wanted)
        self._work.set()

    def forget(self) -> None:
        """Load nothing more of what is wanted now, as when a reader goes around the page cache."""
        self._wanted.clear()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load until cancelled."""
        self._store.on_complete.append(lambda stored: self._work.set())
        task_status.started()
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while ready := next((stored for stored in self._wanted if stored.complete), None):
                self._wanted.remove(ready)
                await self._load(ready)

    async def _load(self, stored: StoredObject) -> None:
        if stored.copied or stored.info.size > self._budget:
            return
        self._budget -= stored.info.size
        descriptor = self._store.backing_descriptor(stored)
        if descriptor is None:
            return
        try:
            with open(os.devnull, "wb", buffering=0) as sink:
                position = 0
                while position < stored.info.size and not stored.copied:
                    size = min(CHUNK_BYTES, stored.info.size - position)
                    load = functools.partial(os.sendfile, sink.fileno(), descriptor, position, size)
                    position += await trio.to_thread.run_sync(in_background, load)
            self._metrics.pages_loaded.inc(position)
        except OSError as error:
            log.warning("cannot read %s ahead: %s", stored.info.id.key, error.strerror)
        finally:
            os.close(descriptor)
