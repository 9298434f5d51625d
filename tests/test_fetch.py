import random
import threading
import time

import pytest
import trio

from modelfs.chunks import CHUNK_BYTES, MIB, ByteRange
from modelfs.errors import AccessDeniedError, ObjectChangedError, OriginError, ReadTimeoutError, TransientOriginError
from modelfs.fetch import HEDGE_SAMPLES, PlanItem
from tests.support.engine import BUDGET, Engine


@pytest.fixture
async def engine(tmp_path, nursery):
    made = []

    async def make(**options):
        engine = Engine(tmp_path / str(len(made)), nursery, **options)
        made.append(engine)
        await engine.start()
        return engine

    yield make
    nursery.cancel_scope.cancel()


def some_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


async def test_twenty_readers_of_one_chunk_cost_one_request(engine):
    made = await engine()
    data = some_bytes(CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    answers = []

    async def reader(number):
        span = ByteRange(number * 1000, number * 1000 + 500)
        answers.append(await made.read(stored, span) == data[span.start : span.stop])

    async with trio.open_nursery() as readers:
        for number in range(20):
            readers.start_soon(reader, number)
    assert answers == [True] * 20
    assert made.origin.requests == [("k", ByteRange(0, CHUNK_BYTES))]


async def test_reader_is_answered_before_the_get_ends(engine):
    made = await engine()
    data = some_bytes(CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    go_on = threading.Event()

    def hold(key, position):
        if position >= 2 * MIB:
            assert go_on.wait(20)

    made.origin.fault = hold
    with trio.fail_after(10):
        assert await made.read(stored, ByteRange(10, MIB)) == data[10:MIB]
        assert not stored.chunks
    go_on.set()
    await made.settle()
    assert stored.complete


async def test_plan_order_and_demand_overtakes(engine):
    made = await engine(max_runs=1)
    first, second, late = (made.origin.put(key, some_bytes(CHUNK_BYTES, key)) for key in ("first", "second", "late"))
    whole = ByteRange(0, CHUNK_BYTES)
    made.fetch.submit([PlanItem(second, whole)], 2)
    made.fetch.submit([PlanItem(first, whole)], 1)
    await made.read(made.store.object(late), whole)
    await made.settle()
    assert [key for key, _ in made.origin.requests] == ["late", "first", "second"]


async def test_a_read_promotes_the_rest_of_its_file(engine):
    made = await engine(whole_files=True)
    data = some_bytes(5 * CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    made.fetch.note_read(stored, ByteRange(0, 1))
    assert await made.read(stored, ByteRange(0, 1)) == data[:1]
    await made.settle()
    with trio.fail_after(5):
        while not stored.complete:
            await trio.sleep(0.01)
    covered = sorted((span.start, span.stop) for _, span in made.origin.requests)
    assert sum(stop - start for start, stop in covered) == len(data)


async def test_transient_failure_is_tried_again_and_a_lasting_one_reported(engine):
    made = await engine()
    data = some_bytes(100)
    stored = made.store.object(made.origin.put("k", data))
    failures = iter([TransientOriginError("reset"), TransientOriginError("reset"), None])

    def fail(key, position):
        error = next(failures)
        if error:
            raise error

    made.origin.fault = fail
    assert await made.read(stored, ByteRange(0, 100)) == data
    other = made.store.object(made.origin.put("other", data))

    def refuse(key, position):
        raise OriginError("refused")

    made.origin.fault = refuse
    with pytest.raises(OriginError, match="refused"):
        await made.read(other, ByteRange(0, 100))


async def test_downloads_that_fail_together_are_one_failure(engine):
    """A connection or a process that breaks takes several downloads with it; the plan pauses once."""
    made = await engine()
    together = threading.Barrier(4)
    objects = [made.origin.put(f"k{number}", some_bytes(CHUNK_BYTES, number)) for number in range(4)]

    def fail(key, position):
        if len(made.origin.requests) <= 4:
            together.wait(20)
            raise TransientOriginError("broken")

    made.origin.fault = fail
    made.fetch.submit([PlanItem(info, ByteRange(0, info.size)) for info in objects], 1)
    began = time.monotonic()
    await made.settle()
    assert all(made.store.object(info).complete for info in objects)
    assert time.monotonic() - began < 3


async def test_a_refused_plan_goes_on_when_access_is_given(engine):
    made = await engine()
    info = made.origin.put("k", some_bytes(CHUNK_BYTES))

    def refuse(key, position):
        if len(made.origin.requests) == 1:
            raise AccessDeniedError("no")

    made.origin.fault = refuse
    made.fetch.submit([PlanItem(info, ByteRange(0, info.size))], 1)
    await made.settle()
    assert made.store.object(info).complete


async def test_what_cannot_be_had_does_not_hold_up_the_rest_of_the_plan(engine):
    made = await engine(max_runs=4)
    bad = [made.origin.put(f"bad{number}", some_bytes(CHUNK_BYTES, number)) for number in range(3)]
    good = made.origin.put("good", some_bytes(CHUNK_BYTES))

    def refuse(key, position):
        if key.startswith("bad"):
            raise AccessDeniedError("no")

    made.origin.fault = refuse
    made.fetch.submit([PlanItem(info, ByteRange(0, info.size)) for info in [*bad, good]], 1)
    with trio.fail_after(5):
        while not made.store.object(good).complete:
            await trio.sleep(0.05)
    assert [key for key, _ in made.origin.requests].index("good") <= 3


async def test_a_deleted_object_is_not_asked_for_again_and_reported(engine):
    made = await engine()
    info = made.origin.put("k", some_bytes(CHUNK_BYTES))
    del made.origin.objects["k"]
    made.fetch.submit([PlanItem(info, ByteRange(0, info.size))], 1)
    await made.settle()
    await trio.sleep(0.7)
    assert len(made.origin.requests) == 1
    assert [one for one, _ in made.failed] == [info]


async def test_what_demand_takes_from_a_planned_download_stays_planned(engine):
    made = await engine(max_runs=4)
    info, last = made.origin.put("planned", some_bytes(8 * CHUNK_BYTES)), made.origin.put("last", b"a")
    gate = threading.Event()
    starts = {0, 4 * CHUNK_BYTES}  # of the two downloads that the plan is given
    made.origin.fault = lambda key, position: position in starts and gate.wait(20) and None
    made.fetch.submit([PlanItem(info, ByteRange(0, info.size)), PlanItem(last, ByteRange(0, 1))], 1)
    stored = made.store.object(info)
    with trio.fail_after(10):
        while len(made.origin.requests) < len(starts):
            await trio.sleep(0.01)
    assert {span.start for _, span in made.origin.requests} == starts
    with made.store.using(stored):
        span = ByteRange(2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 10)
        assert await made.fetch.obtain(stored, 2, span) is not None
        made.fetch.drop_ahead(stored)
    gate.set()
    await made.settle()
    assert stored.complete


async def test_overwritten_object_is_stale_and_reported(engine):
    made = await engine()
    old = made.origin.put("k", some_bytes(10))
    made.origin.put("k", some_bytes(10, 1))
    with pytest.raises(ObjectChangedError):
        await made.read(made.store.object(old), ByteRange(0, 10))
    assert [one for one, _ in made.failed] == [old]


async def test_full_disk_serves_from_memory(engine, monkeypatch):
    made = await engine()
    data = some_bytes(2 * CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))

    def no_space(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made.store, "write_sync", no_space)
    assert await made.read(stored, ByteRange(0, len(data))) == data
    assert await made.read(stored, ByteRange(5, 500)) == data[5:500]
    await made.settle()
    assert made.metrics.registry.get_sample_value("modelfs_store_skipped_chunks_total", {"reason": "disk_full"}) == 2
    assert made.store.reserved_bytes == 0


async def test_object_larger_than_the_cache_streams_through(engine):
    limit = 6 * CHUNK_BYTES
    made = await engine(limit=limit, whole_files=True)
    data = some_bytes(20 * CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    for start in range(0, len(data), MIB):
        span = ByteRange(start, start + MIB)
        made.fetch.note_read(stored, span)
        assert await made.read(stored, span) == data[start : span.stop]
        assert made.store.resident_bytes + made.store.reserved_bytes <= limit + BUDGET
    received = sum(len(span) for _, span in made.origin.requests)
    assert received <= 1.3 * len(data)


async def test_random_readers_under_eviction_see_only_right_bytes(engine):
    """Many interleavings: latencies are drawn per piece, the cap is a third of the data."""
    made = await engine(limit=5 * CHUNK_BYTES)
    rng = random.Random(5)
    files = {
        key: some_bytes(size, key) for key, size in (("a", 6 * CHUNK_BYTES + 3), ("b", 7 * CHUNK_BYTES), ("c", 100))
    }
    stored = {key: made.store.object(made.origin.put(key, data)) for key, data in files.items()}
    wrong = []

    async def reader(seed):
        mine = random.Random(seed)
        for _ in range(40):
            key = mine.choice("abc")
            start = mine.randrange(len(files[key]))
            span = ByteRange(start, min(len(files[key]), start + mine.randrange(1, MIB)))
            made.fetch.note_read(stored[key], span)
            if await made.read(stored[key], span) != files[key][span.start : span.stop]:
                wrong.append((key, span))
            if mine.random() < 0.1:
                await trio.sleep(mine.random() / 100)

    def jitter(key, position):
        if rng.random() < 0.02:
            raise TransientOriginError("drawn")

    made.origin.fault = jitter
    with trio.fail_after(100):
        async with trio.open_nursery() as readers:
            for seed in range(8):
                readers.start_soon(reader, seed)
    assert not wrong
    await made.settle()
    assert made.store.reserved_bytes == 0


async def test_cancelled_reader_leaves_nothing_behind(engine):
    made = await engine()
    data = some_bytes(CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    gate = threading.Event()
    made.origin.fault = lambda key, position: gate.wait(20) and None
    with trio.move_on_after(0.1):
        await made.read(stored, ByteRange(0, 10))
    gate.set()
    assert await made.read(stored, ByteRange(0, 10)) == data[:10]
    await made.settle()
    assert len(made.origin.requests) == 1
    assert [active.refs for active in made.fetch._active.values()] == [0]  # kept until it is needed, held by nobody


async def test_plan_larger_than_the_cache_is_fetched_at_most_once(engine):
    """What does not fit is left out; nothing is downloaded, evicted and downloaded again."""
    limit = 6 * CHUNK_BYTES
    made = await engine(limit=limit)
    data = some_bytes(10 * CHUNK_BYTES)
    made.fetch.submit([PlanItem(made.origin.put("k", data), ByteRange(0, len(data)))], 1)
    await trio.sleep(3)
    received = sum(len(span) for _, span in made.origin.requests)
    assert received <= limit + BUDGET
    assert made.store.resident_bytes <= limit


async def test_demand_finds_a_place_among_long_downloads(engine):
    made = await engine(max_runs=3)
    big = made.origin.put("big", some_bytes(30 * CHUNK_BYTES))
    wanted = some_bytes(100, 7)
    small = made.store.object(made.origin.put("small", wanted))
    gate = threading.Event()
    made.origin.fault = lambda key, position: key == "big" and gate.wait(20) and None
    made.fetch.submit([PlanItem(big, ByteRange(0, 30 * CHUNK_BYTES))], 1)
    await trio.sleep(0.1)
    with trio.fail_after(5):
        assert await made.read(small, ByteRange(0, 100)) == wanted
    gate.set()


async def read_on(made, stored, chunks):
    """Read a few bytes of each chunk, in order, as the file system does for a reader that is served by copy."""
    for index in chunks:
        span = ByteRange(index * CHUNK_BYTES, index * CHUNK_BYTES + 10)
        made.fetch.note_read(stored, span)
        await made.read(stored, span)


async def test_no_more_is_fetched_ahead_of_a_reader_on_its_way_than_the_buffers_hold(engine, monkeypatch):
    monkeypatch.setattr("modelfs.fetch.planner.SILENCE_SECONDS", 1.0)
    made = await engine(whole_files=True)
    info = made.origin.put("big", some_bytes(24 * CHUNK_BYTES))
    other = made.origin.put("other", some_bytes(CHUNK_BYTES))
    stored = made.store.object(info)
    gate = threading.Event()
    made.origin.fault = lambda key, position: key == "big" and position >= 4 * CHUNK_BYTES and gate.wait(20) and None
    with made.store.using(stored):
        stored.copied = True
        await read_on(made, stored, range(3))
        made.fetch.submit([PlanItem(info, ByteRange(0, info.size)), PlanItem(other, ByteRange(0, other.size))], 1)
        gate.set()
        with trio.fail_after(5):
            while not made.store.object(other).complete:
                made.fetch.note_read(stored, ByteRange(2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 10))
                await trio.sleep(0.02)
        for _ in range(10):
            made.fetch.note_read(stored, ByteRange(2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 10))
            await trio.sleep(0.05)
        assert max(stored.chunks) < 2 + BUDGET // CHUNK_BYTES, "further ahead than the buffers reach"
        with trio.fail_after(10):  # the reader is silent: nothing holds the download back
            while not stored.complete:
                await trio.sleep(0.05)


async def test_a_reader_on_its_way_finds_the_chunks_before_it_in_memory(engine):
    made = await engine(whole_files=True)
    info = made.origin.put("big", some_bytes(24 * CHUNK_BYTES))
    stored = made.store.object(info)
    made.fetch.submit([PlanItem(info, ByteRange(0, info.size))], 1)
    found = 0
    with made.store.using(stored):
        stored.copied = True
        await read_on(made, stored, range(2))
        for index in range(2, 24):
            span = ByteRange(index * CHUNK_BYTES, index * CHUNK_BYTES + 10)
            made.fetch.note_read(stored, span)
            await trio.sleep(0.03)  # slower than the download
            found += made.fetch.peek(stored, index, span) is not None
            await made.read(stored, span)
    assert found >= 20
    await made.settle()


async def test_slow_is_not_silent(engine):
    """A reader of a chunk's end waits as long as bytes arrive at all."""
    made = await engine(read_timeout=0.5)
    data = some_bytes(CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    made.origin.fault = lambda key, position: time.sleep(0.2)
    assert await made.read(stored, ByteRange(CHUNK_BYTES - 10, CHUNK_BYTES)) == data[-10:]
    silent = made.store.object(made.origin.put("silent", data))
    gate = threading.Event()
    made.origin.fault = lambda key, position: gate.wait(20) and None
    with pytest.raises(ReadTimeoutError, match="no progress on silent"):
        await made.read(silent, ByteRange(0, 10))
    gate.set()


async def test_a_read_that_ran_into_its_deadline_does_not_wait_for_another(engine):
    """The kernel asks twice for a page that cannot be read."""
    made = await engine(read_timeout=3.0)
    stored = made.store.object(made.origin.put("k", some_bytes(CHUNK_BYTES)))
    gate = threading.Event()
    made.origin.fault = lambda key, position: position >= MIB and gate.wait(20) and None
    span = ByteRange(2 * MIB, 2 * MIB + 10)
    with made.store.using(stored):
        waits = []
        for _ in range(3):
            began = trio.current_time()
            with pytest.raises(ReadTimeoutError):
                await made.fetch.obtain(stored, 0, span)
            waits.append(trio.current_time() - began)
    gate.set()
    assert 2.5 < waits[0] < 7
    assert max(waits[1:]) < 1.5


async def test_a_read_that_fails_again_and_again_ends_with_its_deadline_and_says_why(engine):
    made = await engine(read_timeout=2.0)
    stored = made.store.object(made.origin.put("k", some_bytes(CHUNK_BYTES)))

    def refuse(key, position):
        raise TransientOriginError("the store is beside itself")

    made.origin.fault = refuse
    with made.store.using(stored):
        for longest in (3.0, 1.5):  # the second is the kernel's, for the same page
            began = trio.current_time()
            with pytest.raises((TransientOriginError, ReadTimeoutError), match="beside itself"):
                await made.fetch.obtain(stored, 0, ByteRange(0, 10))
            assert trio.current_time() - began < longest


async def test_a_chunk_that_is_dropped_leaves_memory_too(engine):
    """Else a wrong one would be served from its buffer, and no plan would bring it again."""
    made = await engine()
    data = some_bytes(2 * CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    with made.store.using(stored):
        assert await made.read(stored, ByteRange(0, len(data))) == data
        await made.settle()
        assert made.fetch.peek(stored, 1, ByteRange(CHUNK_BYTES, CHUNK_BYTES + 1)) is not None
        await made.store.discard(stored, 1, "the test")
        assert made.fetch.peek(stored, 1, ByteRange(CHUNK_BYTES, CHUNK_BYTES + 1)) is None
        made.fetch.submit([PlanItem(stored.info, ByteRange(0, len(data)))], 0)
        await made.settle()
    assert stored.complete


async def usual_downloads(made):
    """Let the engine see what is usual: as many first bytes as it needs before it calls one late."""
    for number in range(HEDGE_SAMPLES):
        stored = made.store.object(made.origin.put(f"usual-{number}", b"x"))
        assert await made.read(stored, ByteRange(0, 1)) == b"x"
    await made.settle()


def late_once(gate):
    """Return a fault: the first download of ``k`` waits for ``gate``."""
    seen = []

    def fault(key, position):
        if key == "k":
            seen.append(position)
            if len(seen) == 1:
                gate.wait(20)

    return fault


async def test_a_late_first_byte_is_asked_for_again(engine):
    made = await engine()
    await usual_downloads(made)
    data = some_bytes(CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    gate = threading.Event()
    made.origin.fault = late_once(gate)
    began = trio.current_time()
    assert await made.read(stored, ByteRange(5, 100)) == data[5:100]
    assert trio.current_time() - began < 5
    assert await made.read(stored, ByteRange(0, len(data))) == data
    gate.set()
    await made.settle()
    assert [key for key, _ in made.origin.requests].count("k") == 2
    assert made.metrics.registry.get_sample_value("modelfs_fetch_hedged_total") == 1
    assert stored.resident_bytes == len(data)
    assert made.store.reserved_bytes == 0
    with trio.fail_after(5):
        while made.fetch.statistics()["runs"]:
            await trio.sleep(0.01)


async def test_a_hedge_that_is_no_quicker_changes_nothing(engine):
    made = await engine()
    await usual_downloads(made)
    data = some_bytes(CHUNK_BYTES)
    stored = made.store.object(made.origin.put("k", data))
    gates = [threading.Event(), threading.Event()]
    seen = []

    def fault(key, position):
        if key == "k" and len(seen) < 2:
            seen.append(position)
            gates[len(seen) - 1].wait(20)

    made.origin.fault = fault
    async with trio.open_nursery() as nursery:

        async def read():
            assert await made.read(stored, ByteRange(0, len(data))) == data

        nursery.start_soon(read)
        with trio.fail_after(10):
            while len(seen) < 2:
                await trio.sleep(0.01)
        gates[0].set()
    gates[1].set()
    await made.settle()
    assert stored.resident_bytes == len(data)
    assert made.store.reserved_bytes == 0
    assert made.fetch.statistics()["buffers_used"] <= 1 + HEDGE_SAMPLES


async def test_hedges_are_few(engine):
    """Beyond a first one they stay within a share of what has been received."""
    made = await engine()
    await usual_downloads(made)
    gate = threading.Event()
    made.origin.fault = lambda key, position: key.startswith("late") and gate.wait(20)
    infos = [made.origin.put(f"late-{number}", b"y") for number in range(4)]
    async with trio.open_nursery() as nursery:
        for info in infos:
            nursery.start_soon(made.read, made.store.object(info), ByteRange(0, 1))
        await trio.sleep(1)
        assert made.metrics.registry.get_sample_value("modelfs_fetch_hedged_total") == 1
        gate.set()
