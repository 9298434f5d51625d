import trio

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectId, ObjectInfo
from modelfs.cli.why import advice, explain
from modelfs.config import TreeConfig
from modelfs.loads import IDLE_SECONDS, Load, Loads
from modelfs.tree import Listing, Tree

SIZE = 2 * CHUNK_BYTES


def model():
    return files({"config.json": 10, "a.safetensors": SIZE, "b.safetensors": SIZE})


def files(sizes):
    objects = tuple(ObjectInfo(ObjectId("s3://b", key, "v"), size, 0) for key, size in sizes.items())
    tree = Tree([Listing("", (("s3://b", ""),), objects)], TreeConfig())
    return [tree.find(name) for name in sizes]


def test_time_is_shared_out_by_the_gravest_wait():
    load = Load("m", SIZE, 0.0)
    load.begin("store", 1.0)
    load.begin("origin", 2.0)
    load.begin("origin", 3.0)
    load.end("origin", 4.0)
    load.end("origin", 6.0)
    load.end("store", 7.0)
    load.begin("store", 20.0)
    load.end("store", 20.5)
    assert load.waited == {"origin": 4.0, "store": 2.5}
    assert load.last == 20.5


def test_a_load_knows_its_opens_and_the_order_of_first_use():
    config, a, b = model()
    loads = Loads()
    loads.opened(config, "cached")
    loads.opened(b, "cached")
    loads.opened(a, "cached")
    (load,) = loads.recent
    assert loads.read(b.info, ByteRange(CHUNK_BYTES, CHUNK_BYTES + 5)) is load
    loads.read(b.info, ByteRange(0, 100))
    loads.read(b.info, ByteRange(CHUNK_BYTES + 5, SIZE))  # not its first use
    for start in range(0, SIZE, CHUNK_BYTES // 4):
        loads.read(a.info, ByteRange(start, start + CHUNK_BYTES // 4))
    assert [(touch.id.key, touch.start, touch.stop) for touch in load.touches] == [
        ("b.safetensors", CHUNK_BYTES, SIZE), ("b.safetensors", 0, CHUNK_BYTES), ("a.safetensors", 0, SIZE),
    ]  # fmt: skip
    assert load.opens == {"cached": 2, "passthrough": 0}
    assert load.trace() is None  # nobody waited
    load.begin("origin", 0.0)
    load.end("origin", 1.0)
    assert load.trace() is not None


def test_a_load_that_used_half_of_the_weights_leaves_no_trace():
    _, a, _ = model()
    loads = Loads()
    loads.opened(a, "passthrough")
    load = loads.recent[0]
    load.begin("origin", 0.0)
    load.end("origin", 1.0)
    assert load.touched_bytes == SIZE
    assert load.trace() is None


def test_models_opened_in_turns_are_one_load_each():
    ours, theirs = files({"one/a.safetensors": SIZE, "two/a.safetensors": SIZE})
    loads = Loads()
    for file in (ours, theirs, ours, theirs):
        loads.opened(file, "cached")
    assert [load.model for load in loads.recent] == ["one", "two"]


async def test_every_load_is_handed_over_once(autojump_clock, monkeypatch):
    monkeypatch.setattr("modelfs.loads.time.monotonic", trio.current_time)
    config, a, b = model()
    loads, kept = Loads(), []

    async def keep(load):
        kept.append(load)

    async with trio.open_nursery() as nursery:
        await nursery.start(loads.run, keep)
        loads.opened(config, "cached")
        loads.opened(a, "cached")
        await trio.sleep(IDLE_SECONDS / 2)
        assert kept == []  # half of the weights are still to come
        await trio.sleep(IDLE_SECONDS)
        assert kept == list(loads.recent)
        loads.opened(b, "cached")
        assert len(loads.recent) == 2
        nursery.cancel_scope.cancel()
    assert kept == list(loads.recent)


def status(**changes):
    base = {
        "mountpoint": "/models",
        "ready_seconds": 0.8,
        "prefetch": "auto",
        "fetch": {"received_bytes": 10**9, "busy_seconds": 2.0},
        "origin": {"errors": 0},
        "cache": {"skipped_chunks": {"no_room": 0}},
        "kernel": {"hints": ["read_ahead_kb is 128: run as root"]},
    }
    return {**base, **changes}


def load_document(origin, store):
    return {
        "model": "llama", "size": 10**9, "first_open_seconds": 1.0, "first_weights_seconds": 2.0,
        "last_read_seconds": 11.0, "first_token_seconds": None, "waited_seconds": {"origin": origin, "store": store},
        "opens": {"cached": 4, "passthrough": 2},
    }  # fmt: skip


def test_why_names_the_shares():
    text = explain(status(), load_document(6.1, 0.0), 4e8)
    assert "/models/llama" in text
    assert "61%  waiting for the bucket" in text
    assert "39%  the engine's own work" in text
    assert "- the network card was the limit" in text
    assert "- read_ahead_kb is 128: run as root" in text


def test_why_tells_of_the_first_token_where_the_engine_does():
    assert "first token" not in explain(status(), load_document(6.1, 0.0), 4e8)
    told = explain(status(), {**load_document(6.1, 0.0), "first_token_seconds": 14.5}, 4e8)
    assert "  14.50 s  first token, says the engine" in told


def test_advice_fits_the_cause():
    assert advice(status(), {"origin": 0.01, "store": 0.01}, 5e8, 0) == []
    waited = {"origin": 0.5, "store": 0.0}
    assert "prefetch off" in advice(status(prefetch="off"), waited, 5e8, 0)[0]
    assert "mount earlier" in advice(status(), waited, 5e8, 1e10)[0]
    assert "faster one" in advice(status(), {"origin": 0.0, "store": 0.5}, 5e8, 0)[0]
    assert "failed" in advice(status(origin={"errors": 3}), {"origin": 0.0, "store": 0.0}, 5e8, 0)[0]
