"""``modelfs warm``: download now, with a progress bar."""

import argparse
import time
from urllib.parse import quote

from modelfs.cli.client import ask, locate
from modelfs.cli.progress import Progress
from modelfs.errors import NotReadyError, ObjectNotFoundError
from modelfs.fuse.tuning import Mount

_POLL_SECONDS = 0.25
_STALL_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files or directories in a mount")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when every byte below the paths is local.

    Raises:
        ObjectNotFoundError: A path is not in the mount.
        NotReadyError: Nothing arrived for two minutes; exit status 9.
    """
    for path in arguments.paths:
        mount, relative = locate(path)
        _, answer = ask(mount, "POST", "/v1/warm", {"paths": [relative]})
        if answer["missing"]:
            raise ObjectNotFoundError(f"{path} does not exist in the mount at {mount.mountpoint}", "check the name")
        _follow(mount, relative, path)
    return 0


def _follow(mount: Mount, relative: str, path: str) -> None:
    progress = Progress(f"warm {path}")
    best, best_at = -1, time.monotonic()
    while True:
        _, state = ask(mount, "GET", f"/readyz?all=1&path={quote(relative)}")
        progress.show(state["resident"], state["size"], last=state["complete"])
        if state["complete"]:
            return
        if state["resident"] > best:
            best, best_at = state["resident"], time.monotonic()
        elif time.monotonic() - best_at > _STALL_SECONDS:
            raise NotReadyError(
                f"{path} stays at {state['resident']} of {state['size']} bytes",
                "see the daemon's log; the cache may be too small for it",
            )
        time.sleep(_POLL_SECONDS)
