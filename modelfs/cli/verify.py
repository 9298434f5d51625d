"""``modelfs verify``: are the local bytes the ones that were published?"""

import argparse
import json
from typing import Any

from modelfs.chunks import Step
from modelfs.cli.client import ask, locate
from modelfs.cli.progress import follow
from modelfs.digests import BAD, UNKNOWN, VERIFIED
from modelfs.errors import ConfigError, IntegrityError, NotReadyError, ObjectNotFoundError
from modelfs.fuse.tuning import Mount, mounts

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or directories in a mount")
    parser.add_argument("--all", action="store_true", help="everything that is mounted")
    parser.add_argument("--json", action="store_true", help="one document per path")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when every file is local and none differs from its digest.

    Raises:
        ConfigError: Neither a path nor ``--all``.
        ObjectNotFoundError: A path is not in the mount.
        IntegrityError: A file differs, also after it was fetched once more; exit status 10.
        NotReadyError: Files are not local, or hashing stands still; exit status 9.
    """
    if bool(arguments.paths) == arguments.all:
        raise ConfigError("modelfs verify needs a PATH or --all", "name a file or directory in a mount")
    chosen = [(path, *locate(path)) for path in arguments.paths]
    chosen += [(mount.mountpoint, mount, "") for mount in mounts() if arguments.all]
    reports = {path: _follow(mount, relative, path) for path, mount, relative in chosen}
    for path, report in reports.items():
        print(json.dumps({"path": path, **report}) if arguments.json else _text(path, report))
    bad, partial, unverified = (
        sum(report["counts"][state] for report in reports.values()) for state in (BAD, "partial", "unverified")
    )
    if bad:
        raise IntegrityError(f"{bad} files do not match their digest", "upload them again; see the daemon's log")
    if partial:
        raise NotReadyError(f"{partial} files are not local and were not verified", "run modelfs warm first")
    if unverified:
        raise NotReadyError(f"{unverified} files could not be verified", "see the daemon's log")
    return 0


def _follow(mount: Mount, relative: str, path: str) -> dict[str, Any]:
    """Begin, show progress, and return the last report."""
    report: dict[str, Any] = {}

    def look() -> Step:
        nonlocal report
        _, report = ask(mount, "POST", "/v1/verified" if report else "/v1/verify", {"path": relative})
        if "missing" in report:
            raise ObjectNotFoundError(f"{path} does not exist in the mount at {mount.mountpoint}", "check the name")
        waiting = report["counts"]["pending"] + report["awaited"]
        mark = (report["hashed"], report["resident"], waiting)
        return Step(report["hashed"], report["size"], not waiting, mark)

    follow(f"verify {path}", look, "see the daemon's log")
    return report


def _text(path: str, report: dict[str, Any]) -> str:
    counts = report["counts"]
    lines = [
        f"{path}: {counts[VERIFIED]} verified, {counts[BAD]} bad, {counts[UNKNOWN]} without a digest, "
        f"{counts['partial']} not local"
    ]
    order = sorted(report["details"], key=lambda file: file["state"] != BAD)
    lines += [f"  {file['state']:9} {file['path']}" for file in order[:_SHOWN]]
    if len(order) > _SHOWN:
        lines.append(f"  and {len(order) - _SHOWN} more")
    return "\n".join(lines)
