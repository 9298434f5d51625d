"""Eviction: keeps the store under its limit, in the background.

Above the high watermark (limit less headroom) it removes chunks down to the low one. Order: objects that
nobody uses, least recently used first, their last chunks first; then, only when a reader's chunk needs
room, the least recently used chunks of open objects. Files that the kernel reads without us are left
whole. Knows nothing of why a chunk exists.
"""

import logging
from collections.abc import Callable

import lmdb
import trio

from modelfs.store import Store, StoredObject

log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0
"""How often the disk is looked at even without pressure: another process may fill it."""
_PAGE = 64


class Eviction:
    """The evicting task.

    Args:
        store: The store.
        on_room: Called when room has been made.
    """

    def __init__(self, *, store: Store, on_room: Callable[[], None]) -> None:
        self._store = store
        self._on_room = on_room

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Evict until cancelled."""
        task_status.started()
        while True:
            with trio.move_on_after(CHECK_SECONDS):
                await self._store.pressure.wait()
            self._store.pressure = trio.Event()
            self._store.refresh_space()
            try:
                if await self.make_room():
                    self._on_room()
            except lmdb.Error as error:
                log.error("the index cannot be read, nothing is evicted: %s", error)
                await trio.sleep(CHECK_SECONDS)

    def _excess(self) -> int:
        """Return how many bytes lie above the high watermark."""
        store = self._store
        return store.resident_bytes + store.reserved_bytes - (store.limit_bytes - store.headroom_bytes)

    async def make_room(self) -> int:
        """Evict down to the low watermark if above the high one; return bytes freed."""
        excess = self._excess()
        demand, self._store.demand_waits = self._store.demand_waits, False
        since, self._store.room_since = self._store.room_since, 0.0
        freed = 0
        if excess > 0:
            freed = await self._evict_unused(excess + self._store.headroom_bytes // 2, float("inf"))
        elif since:
            # A download ahead of readers stands at the watermark: room comes from what was not used since it began.
            freed = await self._evict_unused(self._store.headroom_bytes, since)
        if freed < excess and demand:
            freed += await self._evict_open(excess - freed)
        return freed

    async def _evict_unused(self, wanted: int, before: float) -> int:
        """Evict objects that nobody uses and that were last used before ``before`` (seconds since the epoch)."""
        freed, after = 0, (0, 0)
        while freed < wanted:
            page = self._store.least_recent(_PAGE, after)
            if not page:
                break
            for after in page:
                stored = self._store.evictable(after[1])
                if after[0] + 1 > before:
                    return freed
                if stored is not None and not stored.users and freed < wanted:
                    freed += await self._evict_some(
                        stored, sorted(stored.chunks, reverse=True), wanted - freed, "limit"
                    )
        return freed

    async def _evict_open(self, wanted: int) -> int:
        freed = 0
        for stored in sorted(self._store.in_use(), key=lambda item: item.resident_bytes, reverse=True):
            if freed < wanted and not stored.passed:
                freed += await self._evict_some(stored, list(stored.chunks), wanted - freed, "open")
        return freed

    async def _evict_some(self, stored: StoredObject, order: list[int], wanted: int, reason: str) -> int:
        victims, size = [], 0
        for index in order:
            if size >= wanted:
                break
            if not stored.chunks[index].pins:
                victims.append(index)
                size += len(stored.info.chunk_range(index))
        return await self._store.evict(stored, victims, reason)
