"""A fetch engine with store and eviction on a fake origin, in one trio loop and without a kernel."""

import trio

from modelfs.chunks import CHUNK_BYTES, split
from modelfs.config import Size, StoreConfig
from modelfs.eviction import Eviction
from modelfs.fetch import Fetch
from modelfs.memory import Memory
from modelfs.metrics import Metrics
from modelfs.store import Store
from tests.support.fake_origin import FakeOrigin

BUDGET = 8 * CHUNK_BYTES


class Engine:
    """A fetch engine with store and eviction on a fake origin."""

    def __init__(self, path, nursery, *, limit=1 << 30, whole_files=False, max_runs=16, read_timeout=60.0):
        self.metrics = Metrics()
        self.origin = FakeOrigin()
        self.failed = []
        config = StoreConfig(str(path), Size(bytes=limit), Size(bytes=0))
        self.store = Store(config=config, metrics=self.metrics, holder="test", budget=BUDGET)
        self.fetch = Fetch(
            store=self.store,
            origins={self.origin.name: self.origin},
            metrics=self.metrics,
            budget_bytes=BUDGET,
            memory=Memory(),
            whole_files=whole_files,
            on_failed=lambda info, error: self.failed.append((info, error)),
            max_runs=max_runs,
            read_timeout=read_timeout,
        )
        self.eviction = Eviction(store=self.store, on_room=self.fetch.poke)
        self.nursery = nursery

    async def start(self):
        for part in (self.store, self.fetch, self.eviction):
            await self.nursery.start(part.run)

    async def read(self, stored, span):
        out = bytearray()
        with self.store.using(stored):
            for index, part in split(span):
                while True:
                    view = await self.fetch.obtain(stored, index, part)
                    if view is not None:
                        out += view
                        break
                    if stored.missing(part):
                        continue
                    pinned = self.store.pin(stored, part)
                    target = memoryview(bytearray(len(part)))
                    try:
                        descriptor = self.store.descriptor(stored)
                        await trio.to_thread.run_sync(self.store.read_sync, stored, descriptor, pinned, part, target)
                    finally:
                        self.store.unpin(stored, pinned)
                    out += target
                    break
        return bytes(out)

    async def settle(self):
        with trio.fail_after(20):
            while not self.fetch.idle:
                await trio.sleep(0.01)
