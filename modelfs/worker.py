"""The worker's first steps: start the processes that download, then import everything else.

    python -m modelfs.worker FD

FD is the socket to the supervisor, from which the start message comes. Half of a start is imports; where there
are processes that download, the SDK's go on in these meanwhile.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from modelfs.config import Config
from modelfs.logs import setup_logging
from modelfs.memory import Memory

SWITCH_SECONDS = 0.001
"""How long one thread may keep the interpreter: the loop answers readers, it must not queue for 5 ms."""
MAX_PROCESSES = 4
FEW_CORES = 4
"""Below it downloads are threads of this process: where two cores are one processor's threads, a second process
costs more (a third more CPU per byte, 0.1 s more of a start) than it gains. With more, one process would be the
limit: it takes in 2.6 GB/s, but over TLS 0.5 (see bench/ceiling.py)."""
FEW_RUNS, MANY_RUNS = 16, 32
"""Downloads at once, in one process and in several: at 90 MB/s each, 11 and 23 Gbit/s."""
_CALLS_BESIDES_RUNS = 8
"""Listings, and what traces read and write."""


def main() -> int:
    """Run the worker on the socket whose descriptor is the first argument; return the exit code."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c reaches the whole group; the supervisor decides
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    start = json.loads(channel.recv(1024 * 1024))["start"]
    config = Config.from_json(start["config"])
    setup_logging(config.daemon.log_level, config.daemon.log_format)
    count = config.fetch.processes
    if count < 0:
        count = process_count(len(os.sched_getaffinity(0)))
    runs = FEW_RUNS if count < 2 else MANY_RUNS
    processes = None
    if count:
        levels = (config.daemon.log_level, config.daemon.log_format)
        from modelfs.origins.remote import Processes  # noqa: PLC0415 - needed here alone, and a start is imports

        processes = Processes(memory=Memory.share(), count=count, calls=runs + _CALLS_BESIDES_RUNS, logging=levels)
    try:
        code: int = importlib.import_module("modelfs.daemon").serve(channel, start, processes, runs)
    finally:
        if processes is not None:
            processes.stop()
    return code


def process_count(cores: int) -> int:
    """Return how many processes download on a machine with so many cores; 0 for threads of the worker."""
    return 0 if cores < FEW_CORES else min(MAX_PROCESSES, cores // 2)


if __name__ == "__main__":
    sys.exit(main())
