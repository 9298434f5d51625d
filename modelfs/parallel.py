"""How many downloads at once, and in how many processes."""

import os
from typing import TYPE_CHECKING

from modelfs.config import Config
from modelfs.memory import Memory

if TYPE_CHECKING:
    from modelfs.origins.remote import Processes

MAX_PROCESSES = 4
FEW_CORES = 4
"""Below it downloads are threads of this process: where two cores are one processor's threads, a second process
costs more (a third more CPU per byte, 0.1 s more of a start) than it gains. With more, one process would be the
limit: it takes in 2.6 GB/s, but over TLS 0.5 (see bench/ceiling.py)."""
FEW_RUNS, MANY_RUNS = 16, 32
"""Downloads at once, in one process and in several: at 90 MB/s each, 11 and 23 Gbit/s."""
_CALLS_BESIDES_RUNS = 8
"""Listings, and what traces read and write."""


def start_processes(config: Config) -> "tuple[int, Processes | None]":
    """Return the most downloads at once, and the processes that do them; ``None`` where threads of ours do."""
    count = config.fetch.processes
    if count < 0:
        count = process_count(len(os.sched_getaffinity(0)))
    runs = FEW_RUNS if count < 2 else MANY_RUNS
    if not count:
        return runs, None
    from modelfs.origins.remote import Processes  # noqa: PLC0415 - a start is imports

    levels = (config.daemon.log_level, config.daemon.log_format)
    return runs, Processes(memory=Memory.share(), count=count, calls=runs + _CALLS_BESIDES_RUNS, logging=levels)


def process_count(cores: int) -> int:
    """Return how many processes download on a machine with so many cores; 0 for threads of the worker."""
    return 0 if cores < FEW_CORES else min(MAX_PROCESSES, cores // 2)
