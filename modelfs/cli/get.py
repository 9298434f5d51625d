"""``modelfs get``: files into a plain directory, without FUSE, as in init containers and for images."""

import argparse
import dataclasses
import json
from pathlib import Path

import trio

from modelfs.chunks import Step
from modelfs.cli.options import add_options, merge
from modelfs.cli.progress import Progress, human_bytes
from modelfs.errors import CacheError, ConfigError
from modelfs.local import get, store_of
from modelfs.logs import setup_logging
from modelfs.parallel import start_processes

OPTIONS = {
    "endpoint_url", "region", "profile", "no_sign_request", "pin_versions", "addressing", "cache_dir", "cache_size",
    "min_free", "include", "exclude", "max_memory", "processes", "read_timeout", "verify", "log_level", "log_format",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = "modelfs get [NAME=]SOURCE... DIRECTORY [options]"
    parser.add_argument(
        "words", nargs="*", metavar="[NAME=]SOURCE... DIRECTORY", help="with --cache-dir no directory: fill that store"
    )
    parser.add_argument("--json", action="store_true", help="print one document at the end")
    add_options(parser, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when every file is there and none differs from its digest.

    Raises:
        ConfigError: No directory, or a directory and a store.
        IntegrityError: A file differs, also after it was fetched once more; exit status 10.
        ModelfsError: A file cannot be had. What has come stays, for another try.
    """
    words = list(arguments.words)
    directory = words.pop() if words and "://" not in words[-1] else None
    if (directory is None) == (arguments.cache_dir is None):
        raise ConfigError(
            "modelfs get needs a directory to fill, or --cache-dir with the store of a later mount", "name one of them"
        )
    config = merge(arguments, words, "/")
    if directory is not None:
        if Path(directory).exists() and not Path(directory).is_dir():
            raise CacheError(f"{directory} is a file", "name a directory")
        config = dataclasses.replace(config, store=store_of(directory))
    setup_logging(arguments.log_level or "warning", config.daemon.log_format)
    runs, processes = start_processes(config)
    bars: dict[str, Progress] = {}

    def show(what: str, step: Step) -> None:
        label = f"{what} {directory or config.store.cache_dir}"
        bars.setdefault(what, Progress(label)).show(step.done, step.total, last=step.finished)

    try:
        result = trio.run(get, config, directory, runs, processes, show)
    finally:
        if processes is not None:
            processes.stop()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        fetched = f"{human_bytes(result.fetched_bytes)} fetched"
        removed = f", {result.removed_files} removed" if result.removed_files else ""
        print(f"{result.files} files, {human_bytes(result.size_bytes)}; {fetched}{removed}")
    return 0
