import mmap
import os
import random
import tempfile
import time

import lmdb
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelfs.chunks import CHUNK_BYTES, MIB, ByteRange, ObjectId, ObjectInfo
from modelfs.config import Size, StoreConfig
from modelfs.errors import CacheError
from modelfs.eviction import Eviction
from modelfs.metrics import Metrics
from modelfs.store import CorruptChunkError, Store, files


def config(path, size=1 << 30):
    return StoreConfig(str(path), Size(bytes=size), Size(bytes=0))


def open_store(path, size=1 << 30, budget=4 * CHUNK_BYTES):
    return Store(config=config(path, size), metrics=Metrics(), holder="test", budget=budget)


def info(key="k", size=3 * CHUNK_BYTES + 5, version="v"):
    return ObjectInfo(ObjectId("s3://b", key, version), size, 0)


def content(item, index):
    return random.Random(f"{item.id.key}{index}").randbytes(len(item.chunk_range(index)))


def put(store, item, index, *, aligned=False):
    stored = store.object(item)
    data = memoryview(content(item, index))
    if aligned:  # as the engine's buffers are: O_DIRECT takes no other memory
        buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))[: len(data)]
        buffer[:] = data
        data = buffer
    assert store.reserve(len(data))
    store.write_sync(stored, index, data)
    store.added(stored, index, files.checksum(data))
    return stored


def read(store, stored, span):
    pinned = store.pin(stored, span)
    target = memoryview(bytearray(len(span)))
    try:
        store.read_sync(stored, store.descriptor(stored), pinned, span, target)
    finally:
        store.unpin(stored, pinned)
    return bytes(target)


@pytest.mark.parametrize("aligned", [False, True])
def test_reads_across_chunks_and_pieces(tmp_path, aligned):
    store, item = open_store(tmp_path), info()
    for index in range(item.chunk_count):
        stored = put(store, item, index, aligned=aligned)
    whole = b"".join(content(item, index) for index in range(item.chunk_count))
    assert stored.complete
    for start, stop in [
        (0, 1),
        (CHUNK_BYTES - 3, CHUNK_BYTES + 3),
        (MIB - 1, MIB + 1),
        (0, item.size),
        (item.size - 1, item.size),
    ]:
        assert read(store, stored, ByteRange(start, stop)) == whole[start:stop]
    store.close()


async def test_restart_keeps_committed_chunks_and_forgets_others(tmp_path):
    store, item = open_store(tmp_path), info()
    put(store, item, 0)
    put(store, item, 3)
    await store.commit()
    put(store, item, 1)
    store.close()
    again = open_store(tmp_path)
    stored = again.object(item)
    assert sorted(stored.chunks) == [0, 3]
    assert again.resident_bytes == CHUNK_BYTES + 5
    assert read(again, stored, item.chunk_range(3)) == content(item, 3)
    again.close()


async def test_flipped_bit_is_a_miss_never_an_answer(tmp_path):
    store, item = open_store(tmp_path), info()
    put(store, item, 0)
    await store.commit()
    store.close()
    path = files.data_path(tmp_path / "data", item.number)
    with path.open("r+b") as file:
        file.seek(2 * MIB + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    again = open_store(tmp_path)
    stored = again.object(item)
    assert read(again, stored, ByteRange(0, MIB)) == content(item, 0)[:MIB]
    with pytest.raises(CorruptChunkError, match="checksum"):
        read(again, stored, ByteRange(2 * MIB, 2 * MIB + 1))
    await again.discard(stored, 0, "test")
    assert stored.missing(ByteRange(0, 1)) == [0]
    assert again.resident_bytes == 0
    again.close()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
async def test_damaged_data_file_is_fetched_again(tmp_path, damage):
    store, item = open_store(tmp_path), info()
    put(store, item, 0)
    await store.commit()
    store.close()
    path = files.data_path(tmp_path / "data", item.number)
    if damage == "remove":
        path.unlink()
    else:
        os.truncate(path, 100)
    again = open_store(tmp_path)
    assert not again.object(item).chunks
    assert again.resident_bytes == 0
    again.close()


def test_torn_index_is_set_aside(tmp_path, caplog):
    open_store(tmp_path).close()
    (tmp_path / "index" / "data.mdb").write_bytes(b"x" * 20000)
    store = open_store(tmp_path)
    assert store.resident_bytes == 0
    assert "damaged" in caplog.text
    store.close()


def test_second_daemon_is_told_who_holds_the_cache(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(CacheError, match=f"in use by pid {os.getpid()} \\(test\\)"):
        open_store(tmp_path)
    store.close()


def test_another_format_is_one_clear_line(tmp_path):
    store = open_store(tmp_path)
    with store._index._env.begin(write=True) as txn:
        txn.put(b"format", b"99", db=store._index._meta)
    store.close()
    with pytest.raises(CacheError, match="format 99"):
        open_store(tmp_path)


async def test_other_version_shares_nothing(tmp_path):
    store, item = open_store(tmp_path), info()
    put(store, item, 0)
    await store.commit()
    assert not store.object(info(version="other")).chunks
    store.close()


async def test_eviction_takes_unused_objects_first_and_pinned_chunks_never(tmp_path):
    store = open_store(tmp_path, size=6 * CHUNK_BYTES, budget=CHUNK_BYTES)
    old, busy = info("old", 2 * CHUNK_BYTES), info("busy", 4 * CHUNK_BYTES)
    for index in range(2):
        put(store, old, index)
    stored = store.object(busy)
    store.acquire(stored)
    for index in range(4):
        put(store, busy, index)
    await store.commit()
    pinned = store.pin(stored, ByteRange(0, 1))
    assert not store.reserve(CHUNK_BYTES)
    evicted = await Eviction(store=store, on_room=lambda: None).make_room()
    assert evicted
    assert not store.object(old).chunks
    assert 0 in stored.chunks
    assert store.reserve(CHUNK_BYTES)
    assert not files.data_path(tmp_path / "data", old.number).exists()
    store.unpin(stored, pinned)
    store.close()


async def test_prefetch_never_evicts_what_is_open(tmp_path):
    store = open_store(tmp_path, size=4 * CHUNK_BYTES, budget=CHUNK_BYTES)
    item = info("open", 4 * CHUNK_BYTES)
    store.acquire(store.object(item))
    for index in range(4):
        put(store, item, index)
    await store.commit()
    store.demand_waits = False
    assert not store.reserve(CHUNK_BYTES, since=time.time() + 9)
    assert await Eviction(store=store, on_room=lambda: None).make_room() == 0
    store.close()


async def test_prefetch_pushes_out_what_is_older_than_itself_only(tmp_path):
    store = open_store(tmp_path, size=4 * CHUNK_BYTES, budget=CHUNK_BYTES)
    item = info("old", 3 * CHUNK_BYTES)
    for index in range(3):
        put(store, item, index)
    await store.commit()
    evicting = Eviction(store=store, on_room=lambda: None)
    assert not store.reserve(CHUNK_BYTES, since=time.time() - 60)
    assert await evicting.make_room() == 0
    assert not store.reserve(CHUNK_BYTES, since=time.time() + 60)
    assert await evicting.make_room() == CHUNK_BYTES
    assert store.reserve(CHUNK_BYTES, since=time.time() + 60)
    store.close()


async def test_touched_data_file_is_checked_before_it_is_passed_through(tmp_path):
    store, item = open_store(tmp_path), info()
    for index in range(item.chunk_count):
        put(store, item, index)
    await store.commit()
    store.close()
    clean = open_store(tmp_path)
    descriptor = clean.backing_descriptor(clean.object(item))
    assert descriptor is not None
    os.close(descriptor)
    clean.close()
    os.utime(files.data_path(tmp_path / "data", item.number))
    touched = open_store(tmp_path)
    stored = touched.object(item)
    assert touched.backing_descriptor(stored) is None
    read(touched, stored, ByteRange(0, item.size))
    descriptor = touched.backing_descriptor(stored)
    assert descriptor is not None
    os.close(descriptor)
    touched.close()


async def test_discarded_chunk_leaves_no_hole_under_a_pinned_reader(tmp_path):
    store, item = open_store(tmp_path), info()
    stored = put(store, item, 0)
    store.acquire(stored)
    await store.commit()
    pinned = store.pin(stored, ByteRange(0, MIB))
    await store.discard(stored, 0, "test")
    target = memoryview(bytearray(MIB))
    store.read_sync(stored, store.descriptor(stored), pinned, ByteRange(0, MIB), target)
    assert bytes(target) == content(item, 0)[:MIB]
    store.close()


async def test_failed_commit_is_tried_again(tmp_path, monkeypatch):
    store, item = open_store(tmp_path), info()
    put(store, item, 0)

    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        await store.commit()
    assert not store.object(item).chunks[0].durable
    await store.commit()
    assert store.object(item).chunks[0].durable
    store.close()
    again = open_store(tmp_path)
    assert list(again.object(item).chunks) == [0]
    again.close()


async def test_passed_through_files_stay_whole(tmp_path):
    store = open_store(tmp_path, size=4 * CHUNK_BYTES, budget=CHUNK_BYTES)
    item = info("open", 4 * CHUNK_BYTES)
    stored = store.object(item)
    store.acquire(stored)
    for index in range(4):
        put(store, item, index)
    stored.passed = True
    store.reserve(CHUNK_BYTES)
    assert await Eviction(store=store, on_room=lambda: None).make_room() == 0
    assert stored.complete
    store.close()


async def test_orphans_are_removed_beside_serving(tmp_path):
    store, item = open_store(tmp_path), info()
    put(store, item, 0)
    await store.commit()
    orphan = tmp_path / "data" / "00000000000000ff"
    orphan.write_bytes(b"left by a crash")
    await store.recover()
    assert not orphan.exists()
    assert files.data_path(tmp_path / "data", item.number).exists()
    store.close()


async def test_what_cannot_be_forgotten_is_never_trusted(tmp_path, monkeypatch):
    """On a full disk a record may outlive its bytes; the next commit must not make the file look whole."""
    store, item = open_store(tmp_path), info("k", 2 * CHUNK_BYTES)
    put(store, item, 0)
    put(store, item, 1)
    await store.commit()

    def full(*arguments):
        raise lmdb.DiskError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store._index, "forget", full)
        await store.evict(store.object(item), [0], "limit")
    put(store, item, 0)
    await store.evict(store.object(item), [0], "limit")
    put(store, info("other"), 0)
    await store.commit()
    store.close()
    again = open_store(tmp_path)
    assert list(again.object(item).chunks) == [1]
    again.close()


async def test_a_file_written_by_others_is_not_trusted_after_another_chunk_came(tmp_path):
    store, item = open_store(tmp_path), info("k", 2 * CHUNK_BYTES)
    put(store, item, 0)
    await store.commit()
    store.close()
    with files.data_path(tmp_path / "data", item.number).open("r+b") as file:
        file.write(b"rotten")
    store = open_store(tmp_path)
    put(store, item, 1)
    await store.commit()
    store.close()
    again = open_store(tmp_path)
    stored = again.object(item)
    assert stored.complete
    assert again.backing_descriptor(stored) is None
    again.close()


async def test_headroom_follows_the_disk(tmp_path):
    store = open_store(tmp_path, size=100 * CHUNK_BYTES, budget=8 * CHUNK_BYTES)
    store._disk_limit = -5 * CHUNK_BYTES
    assert store.headroom_bytes == 0
    store._disk_limit = 100 * CHUNK_BYTES
    assert store.headroom_bytes == 8 * CHUNK_BYTES
    store.close()


class StoreMachine(RuleBasedStateMachine):
    """Random puts, commits, evictions, restarts and reads against a set of chunk numbers."""

    LIMIT = 5 * CHUNK_BYTES

    def __init__(self):
        super().__init__()
        self.home = tempfile.TemporaryDirectory()
        self.items = [info(f"o{n}", size) for n, size in enumerate((1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7))]
        self.store = open_store(self.home.name, self.LIMIT, budget=CHUNK_BYTES)
        self.durable: set[tuple[int, int]] = set()
        self.written: set[tuple[int, int]] = set()

    def teardown(self):
        self.store.close()
        self.home.cleanup()

    @rule(which=st.integers(0, 2), index=st.integers(0, 2), aligned=st.booleans())
    def write(self, which, index, aligned):
        item = self.items[which]
        if index >= item.chunk_count or (which, index) in self.written | self.durable:
            return
        size = len(item.chunk_range(index))
        if self.store.resident_bytes + size <= self.LIMIT:
            put(self.store, item, index, aligned=aligned)
            self.written.add((which, index))

    @rule()
    def commit(self):
        trio.run(self.store.commit)
        self.durable |= self.written
        self.written.clear()

    @rule(which=st.integers(0, 2))
    def evict(self, which):
        stored = self.store.object(self.items[which])
        trio.run(self.store.evict, stored, list(stored.chunks), "limit")
        self.durable = {key for key in self.durable if key[0] != which}
        self.written = {key for key in self.written if key[0] != which}

    @rule()
    def restart(self):
        self.store.close()
        self.store = open_store(self.home.name, self.LIMIT, budget=CHUNK_BYTES)
        self.written.clear()

    @invariant()
    def what_is_resident_reads_right(self):
        for which, item in enumerate(self.items):
            stored = self.store.object(item)
            assert {(which, index) for index in stored.chunks} == {
                k for k in self.durable | self.written if k[0] == which
            }
            for index in stored.chunks:
                assert read(self.store, stored, item.chunk_range(index)) == content(item, index)
        sizes = sum(len(self.items[which].chunk_range(index)) for which, index in self.durable | self.written)
        assert self.store.resident_bytes == sizes <= self.LIMIT


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
