"""``modelfs push``: a model into a bucket, complete for readers or not at all."""

import argparse
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import trio

from modelfs.chunks import Step, stable_number
from modelfs.cli.options import add_options, merge
from modelfs.cli.progress import Progress, human_bytes
from modelfs.config import Config
from modelfs.errors import ConfigError
from modelfs.local import get, store_of
from modelfs.logs import setup_logging
from modelfs.metrics import Metrics
from modelfs.origins.s3_target import S3Target
from modelfs.parallel import start_processes
from modelfs.push import ARCHIVES, Show, files_of, push, unpack
from modelfs.source import parse_source
from modelfs.store.files import prepare
from modelfs.tree import Filter

OPTIONS = {
    "endpoint_url", "region", "profile", "addressing", "cache_dir", "include", "exclude", "read_timeout", "log_level",
    "log_format",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="FROM", help="a directory, a tar archive, or a source such as hf://ORG/NAME")
    parser.add_argument("target", metavar="TO", help="s3://BUCKET/PREFIX/")
    parser.add_argument("--delete", action="store_true", help="remove what is under the prefix and not in the source")
    parser.add_argument("--json", action="store_true", help="print one document at the end")
    add_options(parser, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when the bucket holds every file, and the list of their digests.

    Raises:
        ConfigError: What is to be pushed cannot be, or the target is no bucket.
        ModelfsError: It could not be done. What has arrived stays, for another try.
    """
    target = parse_source(arguments.target)
    if target.scheme != "s3":
        raise ConfigError(f"'{arguments.target}' cannot be written to", "write s3://BUCKET/PREFIX/")
    config = merge(arguments, [arguments.target], "/")
    setup_logging(arguments.log_level or "warning", config.daemon.log_format)
    bars: dict[str, Progress] = {}

    def show(what: str, step: Step) -> None:
        bars.setdefault(what, Progress(what)).show(step.done, step.total, last=step.finished)

    with _local(arguments.source, config, show) as directory:
        origin = S3Target(source=target, config=config.origin, count=Metrics().origin_counter("s3"))
        shown = Filter(config.tree.include, config.tree.exclude)
        files = {name: path for name, path in files_of(directory).items() if shown(name)}
        result = push(files, origin, target.prefix, show, delete=arguments.delete)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        removed = f", {result.removed_files} removed" if result.removed_files else ""
        sent = f"{human_bytes(result.sent_bytes)} sent in {result.sent_files} files"
        print(f"{result.files} files, {human_bytes(result.size_bytes)}; {sent}{removed}")
    return 0


@contextlib.contextmanager
def _local(text: str, config: Config, show: Show) -> Iterator[Path]:
    """Give a directory with what is to be pushed; archives and other places go through the cache directory."""
    path = Path(text)
    if "://" not in text and path.is_dir():
        yield path
        return
    if "://" not in text and not path.is_file():
        raise ConfigError(f"{text} does not exist", "name a directory, a tar archive or a source")
    if "://" not in text and not path.name.endswith(ARCHIVES):
        raise ConfigError(f"{text} is no tar archive", f"push its directory, or one of {', '.join(ARCHIVES)}")
    directory = (
        Path(config.store.cache_dir)
        / f"push-{stable_number(str(path.absolute()) if '://' not in text else text, config.sources[0].uri):x}"
    )
    if "://" not in text:
        shutil.rmtree(directory, ignore_errors=True)  # of an earlier archive of that name
    prepare(directory)
    if "://" not in text:
        unpack(path, directory)
    else:
        config = dataclasses.replace(config, sources=(parse_source(text),), store=store_of(str(directory)))
        runs, processes = start_processes(config)
        try:
            trio.run(get, config, str(directory), runs, processes, show)
        finally:
            if processes is not None:
                processes.stop()
    yield directory
    shutil.rmtree(directory)  # not after a failure: what has come is not fetched again
