"""``modelfs warm``: download now, with a progress bar."""

import argparse
from urllib.parse import quote

from modelfs.chunks import Step
from modelfs.cli.client import ask, locate
from modelfs.cli.progress import follow
from modelfs.errors import ObjectNotFoundError
from modelfs.fuse.tuning import Mount


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
    most = 0

    def look() -> Step:
        nonlocal most
        _, state = ask(mount, "GET", f"/readyz?all=1&path={quote(relative)}")
        most = max(most, state["resident"])  # in a cache that is too small it goes up and down for ever
        return Step(state["resident"], state["size"], state["complete"], most)

    follow(f"warm {path}", look, "see the daemon's log; the cache may be too small for it")
