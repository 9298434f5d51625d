"""Gives every run the same memory to start from.

A virtual machine whose host takes back free pages (free page reporting, balloons) pays for them again at the
first touch: 3.5 s per GiB instead of 0.5 where this was written, and which run meets such pages is chance. So
free memory is filled with the pages of a sparse file before each run, as on a node that has been up for
a while: what a run needs then comes from pages that the machine already holds.
"""

import os
from pathlib import Path

GIB = 1024 * 1024 * 1024
LEFT_FREE = GIB
_STEP = 16 * 1024 * 1024


def _meminfo(name: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


class Filler:
    """The sparse file, larger than memory; read on from where the last run left off."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "filler"
        self._size = _meminfo("MemTotal") // _STEP * _STEP
        self._path.touch()
        os.truncate(self._path, self._size)
        self._position = 0

    def settle(self) -> None:
        """Write back what is dirty, and fill free memory but for 1 GiB."""
        os.sync()
        descriptor, sink = os.open(self._path, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
        try:
            while _meminfo("MemFree") > LEFT_FREE:
                self._position += os.sendfile(sink, descriptor, self._position, _STEP)
                self._position %= self._size
        finally:
            os.close(descriptor)
            os.close(sink)
