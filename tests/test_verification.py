"""When files are hashed, and how long what came of it holds; through the kernel: ``faults/test_integrity.py``."""

import hashlib
import os
import random

import pytest
import trio

from modelfs import verification
from modelfs.chunks import CHUNK_BYTES, ByteRange
from modelfs.config import TreeConfig
from modelfs.digests import BAD, VERIFIED, Digest, Verdict
from modelfs.errors import IntegrityError, TransientOriginError
from modelfs.store import CorruptChunkError
from modelfs.tree import Listing, Tree
from modelfs.verification import Verification, state_of
from tests.support.engine import Engine

DATA = random.Random(3).randbytes(2 * CHUNK_BYTES + 5)
RIGHT = Digest("sha256", hashlib.sha256(DATA).hexdigest(), "the test")
WRONG = Digest("sha256", "0" * 64, "the test")


class Verified:
    """A verification of one file on a fake origin."""

    def __init__(self, engine, mode, digest, quiet, data=DATA):
        self.engine, self.digest = engine, digest
        self.stored = engine.store.object(engine.origin.put("m/model.bin", data))
        self.asked = 0
        tree = Tree([Listing("", ((self.stored.info.id.origin, "m/"),), (self.stored.info,))], TreeConfig())
        self.verification = Verification(
            mode=mode, store=engine.store, fetch=engine.fetch, ask_store=self.ask, tree=lambda: tree,
            quiet=quiet.is_set, restarted=False, metrics=engine.metrics,
        )  # fmt: skip

    async def ask(self, info):
        self.asked += 1
        if isinstance(self.digest, Exception):
            raise self.digest
        return self.digest

    async def read(self):
        assert await self.engine.read(self.stored, ByteRange(0, len(DATA))) == DATA
        await self.engine.settle()

    async def becomes(self, state):
        with trio.fail_after(10):
            while state_of(self.stored) != state:
                await trio.sleep(0.01)


@pytest.fixture
async def verified(tmp_path, nursery):
    async def make(mode, digest=RIGHT, quiet=None, data=DATA):
        if quiet is None:
            quiet = trio.Event()
            quiet.set()
        engine = Engine(tmp_path / "store", nursery)
        await engine.start()
        made = Verified(engine, mode, digest, quiet, data)
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
    await store.judge(stored, Verdict(VERIFIED, RIGHT), stored.changes)
    store._dirty[stored.info.number, 0] = (stored, stored.chunks[0])
    await store.commit()
    assert store._index.verdict(stored.info.number) is None


async def test_a_file_that_is_evicted_while_it_is_hashed_has_no_verdict(verified, monkeypatch):
    made = await verified("background", quiet=trio.Event())
    await made.read()
    store = made.engine.store
    judge, evicted = store.judge, []

    async def evict_first(stored, verdict, changes):
        evicted.append(await store.evict(stored, [2], "limit"))
        await judge(stored, verdict, changes)

    monkeypatch.setattr(store, "judge", evict_first)
    made.verification.check("")
    with trio.fail_after(10):
        while not evicted:
            await trio.sleep(0.01)
    await trio.sleep(0.1)
    assert state_of(made.stored) == "partial"
    assert store._index.verdict(made.stored.info.number) is None


async def test_a_chunk_that_is_replaced_while_the_others_are_hashed_leaves_no_verdict(verified, monkeypatch):
    made = await verified("off")
    await made.read()
    store, hashed = made.engine.store, made.verification._hash
    replaced = []

    async def hash_and_replace(wanted, hasher):
        value = await hashed(wanted, hasher)
        if not replaced:
            replaced.append(await store.evict(made.stored, [0], "limit"))
            await made.read()
            assert made.stored.complete
        return value

    monkeypatch.setattr(made.verification, "_hash", hash_and_replace)
    made.verification.check("")
    with trio.fail_after(10):
        while not replaced or made.verification._current is not None:
            await trio.sleep(0.01)
    assert state_of(made.stored) == "unverified"


async def test_a_disk_that_damages_a_file_again_and_again_is_left_alone(verified, monkeypatch):
    made = await verified("strict")
    real = made.engine.store.read_sync

    def damage(stored, descriptor, pinned, span, target):
        if span.start >= CHUNK_BYTES:
            raise CorruptChunkError("damaged by the test")
        real(stored, descriptor, pinned, span, target)

    monkeypatch.setattr(made.engine.store, "read_sync", damage)
    await made.read()
    await trio.sleep(1)
    requests = len(made.engine.origin.requests)
    assert requests <= 5
    await trio.sleep(1)
    assert len(made.engine.origin.requests) == requests


async def test_an_empty_file_that_should_not_be_empty_is_bad(verified):
    made = await verified("strict", data=b"")
    made.verification.opened(made.stored)
    await made.becomes(BAD)


async def test_a_mended_digest_is_noticed(verified):
    made = await verified("strict", WRONG)
    await made.read()
    await made.becomes(BAD)
    made.digest = RIGHT
    made.verification.look_again()
    await made.becomes(VERIFIED)


async def test_a_digest_that_cannot_be_had_is_asked_for_again(verified, monkeypatch):
    monkeypatch.setattr(verification, "AGAIN_SECONDS", 0.2)
    made = await verified("background", TransientOriginError("away"))
    await made.read()
    with trio.fail_after(5):
        while not made.asked:
            await trio.sleep(0.01)
    assert state_of(made.stored) == "unverified"
    made.digest = RIGHT
    await made.becomes(VERIFIED)


async def test_a_bad_file_is_fetched_again_also_while_it_is_read(verified):
    """A reader's own download must not be the only one, and lie in memory alone."""
    made = await verified("strict", WRONG)
    stopped = trio.Event()

    async def read_on():
        while not stopped.is_set():
            await made.engine.read(made.stored, ByteRange(0, 100))
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_on)
        await made.read()
        await made.becomes(BAD)
        stopped.set()


async def test_a_store_whose_etags_are_no_md5s_costs_one_file_twice(verified):
    made = await verified("background", Digest("md5", "0" * 32, "ETag"))
    await made.read()
    await made.becomes(BAD)
    other = made.engine.store.object(made.engine.origin.put("m/other.bin", DATA))
    assert await made.engine.read(other, ByteRange(0, len(DATA))) == DATA
    with trio.fail_after(10):
        while state_of(other) != "unknown":
            await trio.sleep(0.01)
    assert sum(len(span) for key, span in made.engine.origin.requests if key == "m/other.bin") == len(DATA)


async def test_asked_for_it_does_not_wait_for_its_next_try(verified):
    made = await verified("background", TransientOriginError("away"))
    await made.read()
    with trio.fail_after(5):
        while not made.asked or made.verification._current is not None:
            await trio.sleep(0.01)
    assert made.verification.report("")["counts"]["pending"] == 0
    made.digest = RIGHT
    made.verification.check("")
    await made.becomes(VERIFIED)
    made.digest = TransientOriginError("away")
    made.verification.check("")
    await made.becomes("unverified")


async def test_a_file_that_a_crash_left_half_written_is_trusted_once_it_is_hashed(verified, tmp_path):
    made = await verified("off", None)
    await made.read()
    await made.engine.store.commit()
    stored = made.stored
    stored.untouched = False  # as its times say after a crash
    for chunk in stored.chunks.values():
        chunk.verified = 0
    assert made.engine.store.backing_descriptor(stored) is None
    made.verification.check("")
    await made.becomes("unknown")
    descriptor = made.engine.store.backing_descriptor(stored)
    assert descriptor is not None
    os.close(descriptor)
    row = made.engine.store._index.object(stored.info.number)
    assert row.stamp == made.engine.store._stamp(stored)
