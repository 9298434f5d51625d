"""``modelfs evict``: give back disk space, and with ``--remote`` remove the objects as well."""

import argparse
import json
import sys
from typing import Any

from modelfs.cli.client import ask, locate
from modelfs.cli.progress import human_bytes
from modelfs.config import OriginConfig
from modelfs.errors import ConfigError, ObjectNotFoundError
from modelfs.metrics import Metrics
from modelfs.source import parse_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files or directories in a mount")
    parser.add_argument("--remote", action="store_true", help="also remove the objects from the bucket, for good")
    parser.add_argument("--yes", action="store_true", help="with --remote: do not ask")
    parser.add_argument("--json", action="store_true", help="one document per path")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when what is not open is no longer local, nor with ``--remote`` in the bucket.

    Raises:
        ObjectNotFoundError: A path is not in the mount.
        ConfigError: Removing from the bucket was not confirmed, or the objects lie where nothing is removed.
        OriginError: An object could not be removed.
    """
    for path in arguments.paths:
        mount, relative = locate(path)
        _, report = ask(mount, "POST", "/v1/evict", {"path": relative})
        if "missing" in report:
            raise ObjectNotFoundError(f"{path} does not exist in the mount at {mount.mountpoint}", "check the name")
        removed = _remove(path, report, asked=arguments.yes) if arguments.remote else 0
        if arguments.json:
            counts = {name: report[name] for name in ("freed_bytes", "in_use_files")}
            print(json.dumps({"path": path, **counts, "removed_objects": removed}))
            continue
        in_use = f", {report['in_use_files']} files are open and stay" if report["in_use_files"] else ""
        gone = f", {removed} objects removed from the bucket" if removed else ""
        print(f"{path}: {human_bytes(report['freed_bytes'])} freed{in_use}{gone}")
    return 0


def _remove(path: str, report: dict[str, Any], *, asked: bool) -> int:
    """Remove the objects with the credentials of whoever runs this command; return how many."""
    from modelfs.origins.s3_target import S3Target  # noqa: PLC0415 - hardly ever needed

    uris: list[str] = report["uris"]
    buckets = sorted({uri.split("/")[2] for uri in uris})
    if not all(uri.startswith("s3://") for uri in uris):
        raise ConfigError(f"not all of {path} lies in s3://", "remove it where it lies")
    if not asked:
        if not sys.stdin.isatty():
            raise ConfigError("removing objects was not confirmed", "say --yes")
        question = f"Remove {len(uris)} objects from {', '.join(buckets)} for good? Type yes: "
        if input(question).strip() != "yes":
            raise ConfigError("removing objects was not confirmed", "type yes")
    config = OriginConfig(**report["origin"])
    for bucket in buckets:
        target = S3Target(source=parse_source(f"s3://{bucket}"), config=config, count=Metrics().origin_counter("s3"))
        for uri in uris:
            _, _, owner, key = uri.split("/", 3)
            if owner == bucket:
                target.delete(key)
    return len(uris)
