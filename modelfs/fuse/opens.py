"""The table of open files that outlives a worker.

An inode may be open in cached mode (reads come to us) or passed through (reads go to a backing file),
never both at once; the kernel answers EIO to a mix. Counts and backing ids therefore live in a memfd
of the supervisor's. One writer: the worker's event loop. Every change is first written to a journal
slot with the request's number, so that a request which is sent again after a crash is counted once.

INVARIANT: of one inode, ``cached`` and ``passed`` are never both above zero.
INVARIANT: ``backing`` is a live backing id if and only if ``passed`` is above zero.
"""

import mmap
import os
import struct
from dataclasses import dataclass

_JOURNAL = struct.Struct("=QIIQIIi")  # unique, valid, slot, inode, cached, passed, backing
_MARK = struct.Struct("=I")
_MARK_OFFSET = 8
_ENTRY = struct.Struct("=QIIi4x")  # inode, cached, passed, backing
_BASE = 64
CAPACITY = 65536
TABLE_BYTES = _BASE + CAPACITY * _ENTRY.size


@dataclass(slots=True)
class OpenState:
    """How one inode is open now."""

    cached: int = 0
    passed: int = 0
    backing: int = 0


def create_table() -> int:
    """Return the descriptor of a new, empty table (a memfd)."""
    descriptor = os.memfd_create("modelfs-opens", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, TABLE_BYTES)
    return descriptor


class OpenTable:
    """A worker's view of the table; reads it whole once, then writes through.

    Args:
        descriptor: The memfd of ``create_table``.
    """

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, TABLE_BYTES)
        self._slots: dict[int, int] = {}
        self._states: dict[int, OpenState] = {}
        self._free: list[int] = []
        self.last_unique = 0
        unique, valid, slot, *entry = _JOURNAL.unpack_from(self._map, 0)
        if valid:
            _ENTRY.pack_into(self._map, _BASE + slot * _ENTRY.size, *entry)
            self.last_unique = unique
        for number, (inode, cached, passed, backing) in enumerate(_ENTRY.iter_unpack(self._map[_BASE:])):
            if inode and (cached or passed):
                self._slots[inode] = number
                self._states[inode] = OpenState(cached, passed, backing)
            else:
                self._free.append(number)
        self._free.reverse()

    def get(self, inode: int) -> OpenState:
        """Return the inode's state; a closed inode has zero counts."""
        return self._states.get(inode) or OpenState()

    def put(self, unique: int, inode: int, state: OpenState) -> None:
        """Record ``state`` as the outcome of request ``unique``.

        Raises:
            OSError: More inodes are open than the table holds.
        """
        slot = self._slots.get(inode)
        if slot is None:
            if not self._free:
                raise OSError(f"more than {CAPACITY} files open")
            slot = self._slots[inode] = self._free.pop()
        entry = (inode, state.cached, state.passed, state.backing)
        # The valid mark falls before the journal is written and rises after it, each as a store of its own.
        _MARK.pack_into(self._map, _MARK_OFFSET, 0)
        _JOURNAL.pack_into(self._map, 0, unique, 0, slot, *entry)
        _MARK.pack_into(self._map, _MARK_OFFSET, 1)
        _ENTRY.pack_into(self._map, _BASE + slot * _ENTRY.size, *entry)
        self.last_unique = unique
        if state.cached or state.passed:
            self._states[inode] = state
        else:
            self._states.pop(inode, None)
            self._free.append(self._slots.pop(inode))

    def inodes(self) -> list[int]:
        """Return the inodes that are open."""
        return list(self._states)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` where an invariant of this module does not hold."""
        for inode, state in self._states.items():
            assert not (state.cached and state.passed), f"inode {inode} is open both ways"
            assert bool(state.backing) == bool(state.passed), f"inode {inode} has a stray backing id"
