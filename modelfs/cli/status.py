"""``modelfs status``."""

import argparse
import json
import sys
import time
from typing import Any

from modelfs.cli.client import locate, status_of
from modelfs.cli.progress import human_bytes, human_seconds
from modelfs.digests import BAD, VERIFIED
from modelfs.errors import ModelfsError
from modelfs.fuse.protocol import MAX_BACKGROUND
from modelfs.fuse.tuning import mounts

_FILES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", nargs="?", metavar="PATH", help="a mountpoint or something in it (default: all mounts)")
    parser.add_argument("--json", action="store_true", help="the daemon's own document")
    parser.add_argument("--watch", action="store_true", help="again every second")


def run(arguments: argparse.Namespace) -> int:
    """Print the state of one mount or of all."""
    while True:
        chosen = [locate(arguments.path)[0]] if arguments.path else mounts()
        documents, failures = [], 0
        for mount in chosen:
            try:
                documents.append(status_of(mount))
            except ModelfsError as error:
                failures = error.exit_code
                print(f"modelfs: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps(documents if arguments.path is None else documents[0] if documents else None))
        else:
            if arguments.watch and sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")
            print("\n\n".join(_text(document) for document in documents) or "nothing is mounted")
        sys.stdout.flush()
        if not arguments.watch:
            return failures
        time.sleep(1)


def _text(status: dict[str, Any]) -> str:
    cache, kernel, reads, origin = status["cache"], status["kernel"], status["reads"], status["origin"]
    rate = origin["rate_bytes_per_second"]
    hit = "-" if reads["hit_rate"] is None else f"{reads['hit_rate']:.1%}"
    lines = [
        f"{status['mountpoint']}  (pid {status['pid']}, up {human_seconds(status['uptime_seconds'])}, "
        f"worker started {status['worker_starts']}x)",
        f"  cache   {human_bytes(cache['resident_bytes'])} of {human_bytes(cache['limit_bytes'])} "
        f"in {cache['directory']}, {human_bytes(cache['evicted_bytes'])} evicted",
        f"  reads   hit rate {hit} (memory {reads['memory']}, store {reads['store']}, origin {reads['origin']})",
        f"  origin  {human_bytes(origin['bytes'])} received, {human_bytes(rate)}/s now",
        f"  kernel  passthrough {_on(kernel['passthrough'])}, resend {_on(kernel['resend'])}, "
        f"read-ahead {kernel['read_ahead_kib']} KiB, max_background {_background(kernel['max_background'])}",
    ]
    lines += [f"          {hint}" for hint in kernel["hints"]]
    for source in status["sources"]:
        share = source["resident"] / source["size"] if source["size"] else 1.0
        eta = f", {human_seconds(source['eta_seconds'])} left" if "eta_seconds" in source else ""
        lines.append(
            f"  {source['name'] or '/'}  {source['uri']}  {source['files_count']} files, "
            f"{human_bytes(source['resident'])} of {human_bytes(source['size'])} ({share:.0%}) {source['state']}{eta}"
        )
        for file in source["files"][:_FILES_SHOWN]:
            use = f"  open, {file['in_use']}" if "in_use" in file else ""
            use += f"  {file['digest']}" if file["digest"] in {VERIFIED, BAD} else ""
            lines.append(f"    {file['state']:9}{human_bytes(file['size']):>11}  {file['path']}{use}")
        if source["files_count"] > _FILES_SHOWN:
            lines.append(f"    and {source['files_count'] - _FILES_SHOWN} more")
    return "\n".join(lines)


def _background(value: int) -> str:
    return str(value) if value >= 0 else f"{MAX_BACKGROUND} asked for (not readable: fusectl is not mounted)"


def _on(value: bool) -> str:
    return "on" if value else "off"
