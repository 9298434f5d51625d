"""How much memory there is, and that for chunk buffers: ours alone, or shared with the processes that fill it.

Pages come into being when they are first touched, so reserving costs nothing. Knows no chunk and no owner.
"""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path


def available_memory() -> int:
    """Return the memory this process may still take, in bytes: the cgroup's limit or what the machine has."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    return min(found)


class Memory:
    """One region of bytes.

    Args:
        descriptor: A memory file (see ``share``), or -1 for memory of this process alone, which the kernel gives in
            huge pages where it can: fewer faults, and fewer pages to pin for the disk.
    """

    def __init__(self, descriptor: int = -1) -> None:
        self.descriptor = descriptor
        self._size = 0
        self._memory: mmap.mmap | None = None
        self._base = 0

    @classmethod
    def share(cls) -> "Memory":
        """Return memory that another process has too, if it inherits the descriptor."""
        return cls(os.memfd_create("modelfs-buffers"))

    def reserve(self, size: int) -> None:
        """Make the region ``size`` bytes long; once, by its owner, before anyone's ``view``."""
        self._size = size
        if self.descriptor >= 0:
            os.ftruncate(self.descriptor, size)

    def view(self, start: int, stop: int) -> memoryview:
        """Return the bytes from ``start`` to ``stop``."""
        if self._memory is None:
            self._memory = self._map()
            self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return memoryview(self._memory)[start:stop]

    def _map(self) -> mmap.mmap:
        if self.descriptor >= 0:
            return mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        memory = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def offset(self, view: memoryview) -> int:
        """Return where ``view``, a part of the region, begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(view)) - self._base
