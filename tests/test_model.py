"""Random operations on everything between kernel and object store, against a model of what readers may see.

A read gives the exact bytes of the version that was opened. It may fail only where that version is gone from the store
or the store refuses it; never for eviction, restarts, crashes, damage on the disk or faults that pass.
"""

import contextlib
import errno
import random
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from modelfs.chunks import ByteRange
from modelfs.errors import AccessDeniedError, ThrottledError, TransientOriginError
from modelfs.fetch import PlanItem
from tests.support.fake_origin import FakeOrigin
from tests.support.system import BUFFERS, CHUNK, GONE, Life, small_chunks

KEYS = ["a", "b/c", "b/d.safetensors", "e"]
SIZES = st.sampled_from([0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 77, 6 * CHUNK])
LIMIT = 9 * CHUNK
POSITIONS = st.integers(0, 7 * CHUNK)


class Machine(RuleBasedStateMachine):
    handles = Bundle("handles")

    @initialize(target=handles, sizes=st.tuples(*[SIZES] * len(KEYS)))
    def begin(self, sizes):
        self.small = small_chunks()
        self.small.__enter__()
        self.home = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.origin = FakeOrigin(piece=3000)
        self.versions = {}
        self.opened = []
        self.damaged = 0
        self.failing = []
        self.denied = set()
        self.origin.fault = self.fault
        self.life = Life(self.home.name, self.origin, LIMIT)
        for key, size in zip(KEYS, sizes, strict=True):
            self.put(key, size)
        self.refresh()
        return multiple(*(self.open(number) for number in range(3)))

    def teardown(self):
        try:
            self.denied.clear()
            self.failing.clear()
            self.life.call(self.at_rest)
        finally:
            self.life.end()
            self.home.cleanup()
            self.small.__exit__(None, None, None)

    def fault(self, key, position):
        if key in self.denied:
            raise AccessDeniedError("denied by the test")
        if self.failing and self.failing[-1][0] <= position:
            raise self.failing.pop()[1]("failed by the test")

    # -- the bucket ---------------------------------------------------------------------------------

    @rule(key=st.sampled_from(KEYS), size=SIZES)
    def put(self, key, size):
        data = random.Random(len(self.versions)).randbytes(size)
        info = self.origin.put(key, data)
        self.versions[info.number] = data

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key):
        self.origin.objects.pop(key, None)

    @rule(position=POSITIONS, kind=st.sampled_from([TransientOriginError, ThrottledError]), count=st.integers(1, 3))
    def fail(self, position, kind, count):
        self.failing += [(position, kind)] * count

    @rule(key=st.sampled_from([*KEYS, "", ""]))
    def deny(self, key):
        """Or permit everything again."""
        self.denied = {key} if key else set()

    # -- the mount ----------------------------------------------------------------------------------

    @rule()
    def refresh(self):
        self.in_loop(self.life.system.refresh)

    @rule(target=handles, choice=st.integers(0, 100))
    def open(self, choice):
        files = list(self.life.system.view.tree.root.walk())
        if not files:
            return multiple()
        inode = files[choice % len(files)].inode
        self.in_loop(lambda: self.life.system.data_path.open(inode, direct=False))
        self.in_loop(lambda: self.life.system.data_path.opened(inode, "cached"))
        self.opened.append(inode)
        return inode

    @rule(inode=consumes(handles))
    def close(self, inode):
        self.opened.remove(inode)
        if inode not in self.opened:
            self.in_loop(lambda: self.life.system.data_path.released(inode))

    @rule(inode=handles, start=POSITIONS, length=st.integers(1, 3 * CHUNK))
    def read_more(self, inode, start, length):
        """Reading is most of what happens."""
        self.read(inode, start, length)

    @rule(inode=handles)
    def read_through(self, inode):
        """As an engine does, so that there are complete files."""
        for start in range(0, max(1, len(self.versions[inode])), CHUNK):
            self.read(inode, start, CHUNK)

    @rule(inode=handles, start=POSITIONS, length=st.integers(1, 3 * CHUNK))
    def read(self, inode, start, length):
        self.check(inode, start, length, self.life.call(self.life.system.read, inode, start, length))

    @rule(reads=st.lists(st.tuples(handles, POSITIONS, st.integers(1, 3 * CHUNK)), min_size=2, max_size=6))
    def read_at_once(self, reads):
        answers = [None] * len(reads)

        async def one(number, *what):
            answers[number] = await self.life.system.read(*what)

        async def everything():
            async with trio.open_nursery() as nursery:
                for number, what in enumerate(reads):
                    nursery.start_soon(one, number, *what)

        self.life.call(everything)
        for what, answer in zip(reads, answers, strict=True):
            self.check(*what, answer)

    def check(self, inode, start, length, answer):
        data = self.versions[inode]
        if answer.bytes is not None:
            assert answer.bytes == data[start : start + length]
            return
        info = self.life.system.view.open[inode].info
        current = self.origin.objects.get(info.id.key)
        if current is None or current[1] != info.id.version:
            assert answer.errno in GONE | {errno.EACCES}
        else:
            assert info.id.key in self.denied, f"errno {answer.errno} without a reason"
            assert answer.errno == errno.EACCES

    @rule(inode=handles)
    def download(self, inode):
        info = self.life.system.view.open[inode].info
        if info.size:
            self.in_loop(lambda: self.life.system.fetch.submit([PlanItem(info, ByteRange(0, info.size))], 1))

    @rule()
    def rest(self):
        if not self.denied:
            self.life.call(self.at_rest)

    # -- the cache ----------------------------------------------------------------------------------

    @rule(inode=handles, first=st.integers(0, 6), count=st.integers(1, 7))
    def evict(self, inode, first, count):
        store = self.life.system.store
        self.life.call(store.evict, self.life.system.view.open[inode], list(range(first, first + count)), "limit")

    @rule(inode=handles)
    def verify(self, inode):
        self.in_loop(lambda: self.life.system.verification.check(""))

    @rule(crash=st.booleans(), damage=st.sampled_from(["none", "none", "flip", "cut", "remove"]), where=POSITIONS)
    def restart(self, crash, damage, where):
        self.in_loop(self.before_restart)
        self.life.call(self.life.restart, crash)
        self.harm(damage, where)
        self.in_loop(self.after_restart)

    def before_restart(self):
        self.known = {inode: self.life.system.view.open[inode].info for inode in set(self.opened)}

    def after_restart(self):
        system = self.life.system
        for inode, info in self.known.items():  # what the kernel holds open, and the index or the listing may know
            stored = system.store.object(info)
            system.store.acquire(stored)
            stored.copied = True
            system.view.open[inode] = stored

    def harm(self, damage, where):
        """Between two lives, before anything is loaded from the index; what no record names is being removed."""
        with contextlib.suppress(FileNotFoundError):
            self.harm_file(damage, where)

    def harm_file(self, damage, where):
        files = sorted((Path(self.home.name) / "data").iterdir())
        if damage == "none" or not files:
            return
        path = files[where % len(files)]
        if damage == "remove":
            path.unlink()
        elif damage == "cut":
            with path.open("r+b") as file:
                file.truncate(where)
        else:
            with path.open("r+b") as file:
                data = bytearray(file.read())
                if data:
                    data[where % len(data)] ^= 0xFF
                    file.seek(0)
                    file.write(data)

    # -- what always holds --------------------------------------------------------------------------

    def in_loop(self, function):
        async def call():
            return function()

        return self.life.call(call)

    @invariant()
    def alive(self):
        if hasattr(self, "life"):
            assert self.life.failure is None, self.life.failure
            store = self.life.system.store
            assert store.resident_bytes + store.reserved_bytes <= LIMIT + BUFFERS * CHUNK

    async def at_rest(self):
        """Nothing is lost: neither buffers nor reservations nor pins, and the books are right."""
        system = self.life.system
        await system.settle()
        store, fetch = system.store, system.fetch
        assert store.reserved_bytes == 0
        assert fetch._pool.used == len(fetch._active)
        assert not fetch._owner
        assert not fetch._demand_waiters
        for stored in store._objects.values():
            assert not any(chunk.pins for chunk in stored.chunks.values())
            assert stored.resident_bytes == sum(len(stored.info.chunk_range(index)) for index in stored.chunks)
            assert stored.users == (stored.info.number in system.view.open)
        loaded = sum(stored.resident_bytes for stored in store._objects.values())
        others = [store._index.object(number) for number in store._index.numbers() - set(store._objects)]
        assert store.resident_bytes == loaded + sum(row.resident for row in others if row)


class TestModel(Machine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
class TestModelForLong(Machine.TestCase):
    settings = settings(max_examples=10_000, stateful_step_count=25, deadline=None)
