import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.fuse import protocol
from modelfs.fuse.opens import CAPACITY, OpenState, OpenTable, create_table
from modelfs.fuse.tuning import Tuning, mount_of, mounts


def init_request(low: int, high: int, minor: int = 41) -> bytes:
    body = protocol.INIT_IN.pack(7, minor, 131072, low, high)
    return protocol.IN_HEADER.pack(protocol.IN_HEADER.size + len(body), protocol.INIT, 9, 0, 0, 0, 1, 0) + body


def test_init_takes_what_is_offered_and_no_more():
    everything = protocol.WANTED | 1 << 1
    reply, agreed = protocol.init_reply(init_request(everything & 0xFFFFFFFF, everything >> 32))
    _, error, unique = protocol.OUT_HEADER.unpack_from(reply)
    major, _, _, low, background, threshold, _, _, pages, _, high, depth = protocol.INIT_OUT.unpack_from(reply, 16)
    assert (error, unique, major) == (0, 9, 7)
    assert low | high << 32 == protocol.WANTED
    assert (background, threshold, pages, depth) == (64, 48, 256, 1)
    assert agreed.passthrough
    assert agreed.resend


def test_old_kernel_gets_no_passthrough():
    _, agreed = protocol.init_reply(init_request(protocol.ASYNC_READ, 0xFFFFFFFF, minor=31))
    assert not agreed.passthrough
    assert not agreed.resend
    assert any("passthrough" in hint for hint in Tuning().hints())


@given(st.binary(max_size=200))
def test_garbage_is_refused_not_misread(data):
    with pytest.raises(ValueError, match="request|INIT"):
        protocol.init_reply(data)


def test_open_table_outlives_its_reader():
    table = create_table()
    first = OpenTable(table)
    first.put(4, 77, OpenState(cached=2))
    first.put(6, 88, OpenState(passed=1, backing=5))
    first.put(8, 77, OpenState(cached=1))
    second = OpenTable(table)
    assert second.get(77) == OpenState(cached=1)
    assert second.get(88) == OpenState(passed=1, backing=5)
    assert second.last_unique == 8
    second.check_invariants()
    second.put(10, 77, OpenState())
    assert sorted(OpenTable(table).inodes()) == [88]
    os.close(table)


def test_open_table_finishes_a_change_that_was_cut_off():
    """A kill between journal and entry: the journal is applied by the next worker."""
    table = create_table()
    first = OpenTable(table)
    first.put(4, 77, OpenState(cached=1))
    slot = first._slots[77]
    os.pwrite(table, b"\0" * 24, 64 + slot * 24)  # as if the entry had not been written
    second = OpenTable(table)
    assert second.get(77) == OpenState(cached=1)
    os.close(table)


@given(st.lists(st.tuples(st.integers(2, 6), st.booleans()), max_size=60))
def test_open_table_equals_a_dictionary(steps):
    table = create_table()
    try:
        real, model = OpenTable(table), {}
        for unique, (inode, up) in enumerate(steps, 1):
            count = max(0, model.get(inode, 0) + (1 if up else -1))
            model[inode] = count
            real.put(unique, inode, OpenState(cached=count))
        again = OpenTable(table)
        for inode, count in model.items():
            assert again.get(inode).cached == real.get(inode).cached == count
        assert len(real._free) + len(real._slots) == CAPACITY
    finally:
        os.close(table)


def test_mount_lookup_never_needs_the_path_to_exist():
    assert mount_of("/nowhere/at/all") is None
    assert isinstance(mounts(), list)
