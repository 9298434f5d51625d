"""When files are hashed, and how long what came of it holds; through the kernel: ``faults/test_integrity.py``."""

import hashlib
import random

import pytest
import trio

from modelfs.chunks import CHUNK_BYTES, ByteRange
from modelfs.config import TreeConfig
from modelfs.digests import BAD, VERIFIED, Digest, Verdict
from modelfs.errors import IntegrityError
from modelfs.tree import Listing, Tree
from modelfs.verification import Verification, state_of
from tests.support.engine import Engine

DATA = random.Random(3).randbytes(2 * CHUNK_BYTES + 5)
RIGHT = Digest("sha256", hashlib.sha256(DATA).hexdigest(), "the test")
WRONG = Digest("sha256", "0" * 64, "the test")


class Verified:
    """A verification of one file on a fake origin."""

    def __init__(self, engine, mode, digest, quiet):
        self.engine, self.digest = engine, digest
        self.stored = engine.store.object(engine.origin.put("m/model.bin", DATA))
        self.asked = 0
        self.invalidated = []
        tree = Tree([Listing("", "m/", (self.stored.info,))], TreeConfig())
        self.verification = Verification(
            mode=mode, store=engine.store, fetch=engine.fetch, ask_store=self.ask, tree=lambda: tree,
            quiet=quiet.is_set, invalidate=self.invalidate, metrics=engine.metrics,
        )  # fmt: skip

    async def ask(self, info):
        self.asked += 1
        return self.digest

    async def invalidate(self, inode):
        self.invalidated.append(inode)

    async def read(self):
        assert await self.engine.read(self.stored, ByteRange(0, len(DATA))) == DATA
        await self.engine.settle()

    async def becomes(self, state):
        with trio.fail_after(10):
            while state_of(self.stored) != state:
                await trio.sleep(0.01)


@pytest.fixture
async def verified(tmp_path, nursery):
    async def make(mode, digest=RIGHT, quiet=None):
        if quiet is None:
            quiet = trio.Event()
            quiet.set()
        engine = Engine(tmp_path / "store", nursery)
        await engine.start()
        made = Verified(engine, mode, digest, quiet)
        await nursery.start(made.verification.run)
        return made

    yield make
    nursery.cancel_scope.cancel()


async def test_in_the_background_files_are_hashed_when_it_is_quiet(verified):
    quiet = trio.Event()
    made = await verified("background", quiet=quiet)
    await made.read()
    await trio.sleep(0.3)
    assert state_of(made.stored) == "unverified"
    assert not made.verification.withholds(made.stored)
    quiet.set()
    await made.becomes(VERIFIED)


async def test_asked_for_it_does_not_wait_for_quiet(verified):
    made = await verified("background", quiet=trio.Event())
    await made.read()
    made.verification.check("")
    await made.becomes(VERIFIED)
    with trio.fail_after(5):
        while (report := made.verification.report(""))["counts"]["pending"]:
            await trio.sleep(0.01)
    assert report["counts"][VERIFIED] == 1
    assert report["hashed"] == report["size"] == len(DATA)


async def test_off_hashes_nothing_by_itself(verified):
    made = await verified("off")
    await made.read()
    made.verification.opened(made.stored)
    await trio.sleep(0.3)
    assert state_of(made.stored) == "unverified"
    assert not made.asked


async def test_strict_withholds_until_verified(verified):
    made = await verified("strict")
    assert made.verification.withholds(made.stored)
    await made.read()
    await made.becomes(VERIFIED)
    assert not made.verification.withholds(made.stored)
    made.verification.opened(made.stored)


async def test_what_does_not_match_is_fetched_once_more_and_then_bad(verified):
    made = await verified("strict", WRONG)
    await made.read()
    await made.becomes(BAD)
    assert len({span.start for _, span in made.engine.origin.requests}) < len(made.engine.origin.requests)
    with trio.fail_after(5):
        while made.invalidated != [made.stored.info.number] * 2:
            await trio.sleep(0.01)
    assert made.verification.refuses(made.stored)
    with pytest.raises(IntegrityError, match="does not match the test"):
        made.verification.opened(made.stored)


async def test_without_a_digest_nothing_is_refused(verified):
    made = await verified("strict", None)
    await made.read()
    await made.becomes("unknown")
    made.verification.opened(made.stored)
    assert not made.verification.withholds(made.stored)


async def test_a_verdict_ends_with_the_first_chunk_that_goes(verified):
    made = await verified("background")
    await made.read()
    await made.becomes(VERIFIED)
    store, number = made.engine.store, made.stored.info.number
    async with store._commit_lock:  # it is being written down
        assert store._index.verdict(number) == Verdict(VERIFIED, RIGHT)
    await store.evict(made.stored, [1], "limit")
    assert state_of(made.stored) == "partial"
    assert store._index.verdict(number) is None
    await made.read()
    await made.becomes(VERIFIED)
    assert made.asked == 2


async def test_a_verdict_is_not_kept_of_chunks_that_are_recorded_after_it(verified):
    """After a crash the missing chunk is another download, which nobody has hashed."""
    made = await verified("off")
    await made.read()
    await made.engine.store.commit()
    store, stored = made.engine.store, made.stored
    await store.judge(stored, Verdict(VERIFIED, RIGHT))
    store._dirty[stored.info.number, 0] = (stored, stored.chunks[0])
    await store.commit()
    assert store._index.verdict(stored.info.number) is None


async def test_a_file_that_is_evicted_while_it_is_hashed_has_no_verdict(verified, monkeypatch):
    made = await verified("background", quiet=trio.Event())
    await made.read()
    store = made.engine.store
    judge, evicted = store.judge, []

    async def evict_first(stored, verdict):
        evicted.append(await store.evict(stored, [2], "limit"))
        await judge(stored, verdict)

    monkeypatch.setattr(store, "judge", evict_first)
    made.verification.check("")
    with trio.fail_after(10):
        while not evicted:
            await trio.sleep(0.01)
    await trio.sleep(0.1)
    assert state_of(made.stored) == "partial"
    assert store._index.verdict(made.stored.info.number) is None
