"""``modelfs ls``: what a source holds, without a mount."""

import argparse
import datetime as dt
import json

import trio

from modelfs.cli.options import add_options, merge
from modelfs.cli.progress import human_bytes
from modelfs.config import Config
from modelfs.logs import setup_logging
from modelfs.metrics import Metrics
from modelfs.sources import Sources
from modelfs.tree import Tree

OPTIONS = {
    "endpoint_url", "region", "profile", "no_sign_request", "pin_versions", "addressing", "include", "exclude",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("sources", nargs="*", metavar="[NAME=]SOURCE", help="see modelfs mount")
    parser.add_argument("--json", action="store_true", help="one document per file")
    add_options(parser, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when everything could be listed.

    Raises:
        ModelfsError: A source cannot be listed.
    """
    setup_logging("warning", "text")
    tree = trio.run(_list, merge(arguments, arguments.sources, "/"))
    for file in tree.root.walk():
        info = file.info
        if arguments.json:
            about = {"path": file.path, "size": info.size, "version": info.id.version, "origin": info.id.origin}
            print(json.dumps({**about, "modified": info.mtime_ns // 10**9}))
        else:
            when = dt.datetime.fromtimestamp(info.mtime_ns / 1e9, dt.UTC)
            print(f"{human_bytes(info.size):>10}  {when:%Y-%m-%d %H:%M}  {file.path}")
    if not arguments.json:
        print(f"{human_bytes(tree.total_bytes):>10}  in {tree.file_count} files")
    return 0


async def _list(config: Config) -> Tree:
    sources = Sources(config, Metrics(), None)
    return sources.tree(await sources.refresh())
