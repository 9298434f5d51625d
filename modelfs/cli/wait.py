"""``modelfs wait``: for scripts and probes."""

import argparse
import time
from urllib.parse import quote

from modelfs import config as configuration
from modelfs.cli.client import ask, locate
from modelfs.errors import ConfigError, DaemonUnreachableError, NotReadyError, ObjectNotFoundError

_POLL_SECONDS = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="a mountpoint, a model's directory or a file")
    parser.add_argument(
        "--for",
        dest="level",
        choices=["mounted", "heads", "complete"],
        default="mounted",
        help="mounted: it answers; heads: small files, headers and tails are local; complete: every byte is",
    )
    parser.add_argument("--timeout", default="off", metavar="SECONDS", help="give up after this long (default: never)")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 once the level is reached.

    Raises:
        NotReadyError: The timeout passed first; exit status 9.
        ObjectNotFoundError: The mount has no such path.
    """
    try:
        timeout = configuration.parse_seconds(arguments.timeout)
    except ValueError as error:
        raise ConfigError(f"--timeout: bad value '{arguments.timeout}'", str(error)) from error
    deadline = time.monotonic() + (timeout or float("inf"))
    asked = arguments.level == "mounted"
    while True:
        state = "not mounted"
        try:
            mount, relative = locate(arguments.path)
            if not asked:
                asked = bool(ask(mount, "POST", "/v1/want", {"path": relative}))
            code, answer = ask(mount, "GET", f"/readyz?path={quote(relative)}")
        except DaemonUnreachableError:
            pass  # not mounted yet, or between two workers
        else:
            if code == 404:
                raise ObjectNotFoundError(
                    f"{arguments.path} does not exist in the mount at {mount.mountpoint}", "check the name"
                )
            if arguments.level == "mounted" or answer.get(arguments.level):
                return 0
            state = f"{answer['share']:.0%} local"
        if time.monotonic() > deadline:
            raise NotReadyError(
                f"{arguments.path} did not reach '{arguments.level}' in {timeout:.0f} s ({state})", "raise --timeout"
            )
        time.sleep(_POLL_SECONDS)
