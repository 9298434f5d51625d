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
from modelfs.parallel import start_processes

SWITCH_SECONDS = 0.001
"""How long one thread may keep the interpreter: the loop answers readers, it must not queue for 5 ms."""


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
    runs, processes = start_processes(config)
    try:
        code: int = importlib.import_module("modelfs.daemon").serve(channel, start, processes, runs)
    finally:
        if processes is not None:
            processes.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
