"""What to download before anyone asks, and in which order.

``plan`` is pure: from a model's directory to the spans to fetch. ``Prefetch`` decides when: at mount if
the source is one model, else at the first touch of a model's directory. Engines spend seconds on imports
before their first weight byte; the download hides there. Knows no FUSE reply and no data file.

A directory is a model if weight files lie in it, or a ``model_index.json`` (then its parts, the
subdirectories, belong to it).
"""

import json
import logging
import re
import time
from dataclasses import dataclass

import trio

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectInfo
from modelfs.errors import ModelfsError
from modelfs.fetch import Fetch, PlanItem
from modelfs.pages import Pages
from modelfs.store import Store
from modelfs.traces import Traces
from modelfs.tree import Directory, File, Node, Tree, natural_key

log = logging.getLogger(__name__)

SMALL_BYTES = CHUNK_BYTES
"""Configurations, tokenizers and indexes are below this; a weight file hardly ever."""
PAUSE_SECONDS = 60.0
INDEX_LIMIT_BYTES = 64 * 1024 * 1024
RANK_SMALL, RANK_ENDS, RANK_WEIGHTS, RANK_REST = range(4)
PREFERRED_SUFFIXES = (".safetensors",)
DUPLICATE_SUFFIXES = (".bin", ".pth", ".pt", ".msgpack", ".h5", ".ot", ".onnx")
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True, slots=True)
class Ranked:
    """A span and its place in the plan."""

    rank: int
    item: PlanItem


def is_weights(name: str) -> bool:
    """Return whether a file's name says that it holds weights."""
    return name.endswith((*PREFERRED_SUFFIXES, ".gguf", *DUPLICATE_SUFFIXES))


def is_model(directory: Directory) -> bool:
    """Return whether ``directory`` is a model of its own."""
    return "model_index.json" in directory.entries or any(is_weights(file.name) for file in directory.files())


def model_of(directory: Directory) -> Directory | None:
    """Return the model that ``directory`` belongs to, or ``None``."""
    current: Directory | None = directory
    while current is not None:
        if "model_index.json" in current.entries:
            return current
        current = current.parent
    return directory if is_model(directory) else None


def index_file(directory: Directory) -> File | None:
    """Return the file that names the shards, or ``None``."""
    entry = directory.entries.get("model.safetensors.index.json")
    return entry if isinstance(entry, File) else None


def model_files(directory: Directory) -> list[File]:
    """Return the files that starting this model will read, in load order: natural sort, duplicates left out."""
    files = directory.files()
    preferred = any(file.name.endswith(PREFERRED_SUFFIXES) for file in files)
    wanted = [file for file in files if not (preferred and _is_duplicate(file.name))]
    gguf = {_SHARD.sub(r"\1", file.name) for file in wanted if file.name.endswith(".gguf")}
    if len(gguf) > 1:
        # Several quantizations side by side: an engine opens one, and its open fetches the rest of it.
        wanted = [file for file in wanted if not file.name.endswith(".gguf")]
    for child in directory.directories():
        if "model_index.json" in directory.entries:
            wanted.extend(model_files(child))
        elif child.name != "original" and not is_model(child):
            wanted.extend(file for file in child.walk() if file.info.size <= SMALL_BYTES)
    return sorted(wanted, key=lambda file: natural_key(file.path))


def _is_duplicate(name: str) -> bool:
    return name.endswith(DUPLICATE_SUFFIXES) or name.startswith("consolidated")


def plan(files: list[File], shards: set[str] | None = None) -> list[Ranked]:
    """Return the spans of ``files`` in order: small files, ends of weight files, weights, the rest.

    Args:
        files: What ``model_files`` returned.
        shards: Names in the index file, if there is one; other weights come after them.
    """
    whole = {file: ByteRange(0, file.info.size) for file in files if file.info.size}
    small = [file for file in whole if file.info.size <= SMALL_BYTES and not is_weights(file.name)]
    weights = [file for file in whole if is_weights(file.name)]
    rest = [file for file in whole if file not in small and file not in weights]
    listed = [file for file in weights if shards is None or file.name in shards]
    ranked = [Ranked(RANK_SMALL, PlanItem(file.info, whole[file])) for file in small]
    ranked += [Ranked(RANK_ENDS, PlanItem(file.info, span)) for file in listed for span in ends(file.info)]
    ranked += [Ranked(RANK_WEIGHTS, PlanItem(file.info, whole[file])) for file in listed]
    others = [file for file in weights if file not in listed] + rest
    return ranked + [Ranked(RANK_REST, PlanItem(file.info, whole[file])) for file in others]


def ends(info: ObjectInfo) -> list[ByteRange]:
    """Return the first and the last chunk: headers are read first by all, tails first by llama.cpp."""
    spans = [info.chunk_range(0)]
    if info.chunk_count > 1:
        spans.append(info.chunk_range(info.chunk_count - 1))
    return spans


def parse_index(data: bytes) -> set[str] | None:
    """Return the shard names in a ``model.safetensors.index.json``, or ``None`` if it is not one."""
    try:
        names = set(json.loads(data)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return names if all(isinstance(name, str) for name in names) else None


class Prefetch:
    """Feeds plans to the fetch engine.

    Args:
        mode: ``off``, ``auto``, ``all`` or comma-separated names of models.
        store: To know what is resident already.
        fetch: The engine.
        pages: Takes complete files into memory.
        traces: Knows how models were read before.
    """

    def __init__(self, *, mode: str, store: Store, fetch: Fetch, pages: Pages, traces: Traces) -> None:
        self._mode = mode
        self._store = store
        self._fetch = fetch
        self._pages = pages
        self._traces = traces
        self._touched: dict[int, float] = {}
        self._models_touched: dict[int, float] = {}
        self._models_wanted: set[int] = set()
        self._send, self._receive = trio.open_memory_channel[Directory](1000)

    @property
    def automatic(self) -> bool:
        """Whether touching a model starts its download."""
        return self._mode in {"auto", "all"}

    def start(self, tree: Tree) -> None:
        """Begin what the mode asks for at mount, or after the listing changed."""
        self._touched.clear()
        self._models_touched.clear()
        self._models_wanted.clear()
        if self._mode == "off":
            return
        if self._mode == "all":
            for directory in _models(tree.root):
                self.want(directory)
            return
        if self._mode != "auto":
            for name in self._mode.split(","):
                self._start_named(tree, name.strip())
            return
        children = tree.root.directories()
        for top in [tree.root, *(children if len(children) == 1 else ())]:
            if is_model(top):
                self.want(top)

    def _start_named(self, tree: Tree, name: str) -> None:
        node = tree.find(name)
        if node is None:
            log.warning("--prefetch names '%s', which is not in the mount", name)
        elif isinstance(node, File):
            self._fetch.submit([PlanItem(node.info, ByteRange(0, node.info.size))], RANK_WEIGHTS)
        else:
            for directory in _models(node):
                self.want(directory)

    def touch(self, directory: Directory) -> None:
        """Note that someone uses what lies in ``directory``; cheap when repeated.

        The first sign plans the model's download. Where that was done at the mount, or after a pause, it is an
        engine's start, and the kernel may have reclaimed pages since: complete files are taken into memory again,
        which costs 20 ms of processor time per GB where they are there still.
        """
        if not self.automatic:
            return
        now = time.monotonic()
        last, self._touched[directory.inode] = self._touched.get(directory.inode, float("-inf")), now
        if now - last < PAUSE_SECONDS:
            return
        model = model_of(directory)
        if model is None:
            return
        last, self._models_touched[model.inode] = self._models_touched.get(model.inode, float("-inf")), now
        if model.inode not in self._models_wanted:
            self.want(model)
        elif now - last >= PAUSE_SECONDS:  # a model's parts are directories that are touched one after the other
            self._pages.want(self._store.object(file.info) for file in model_files(model))

    def skip_pages(self) -> None:
        """Take nothing more into memory that is wanted now: a reader goes around the page cache."""
        self._pages.forget()

    def want(self, directory: Directory) -> None:
        """Plan a model's download, once per listing."""
        if directory.inode in self._models_wanted:
            return
        self._models_wanted.add(directory.inode)
        try:
            self._send.send_nowait(directory)
        except trio.WouldBlock:
            log.warning("too many models touched at once: %s is fetched on demand only", directory.path)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Turn wanted models into plans until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            async for directory in self._receive:
                nursery.start_soon(self._plan_model, directory)

    async def _plan_model(self, directory: Directory) -> None:
        files = model_files(directory)
        ranked = plan(files)
        self._pages.want(self._store.object(file.info) for file in files)
        missing = sum(file.info.size - self._store.object(file.info).resident_bytes for file in files)
        if not missing:
            return
        log.info("prefetching %s: %d files, %.1f MiB to fetch", directory.path or "/", len(files), missing / 2**20)
        by_rank: dict[int, list[PlanItem]] = {}
        for entry in ranked:
            by_rank.setdefault(entry.rank, []).append(entry.item)
        for rank in (RANK_SMALL, RANK_ENDS):
            self._fetch.submit(by_rank.get(rank, []), rank)
        before = await self._traces.find([file.info for file in files])
        if before is not None:
            log.info("downloading %s in the order of an earlier load", directory.path or "/")
            self._fetch.submit((PlanItem(info, span) for info, span in before), RANK_WEIGHTS)
        shards = await self._read_index(directory)
        for entry in plan(files, shards) if shards is not None else ranked:
            if entry.rank in {RANK_WEIGHTS, RANK_REST}:
                self._fetch.submit([entry.item], entry.rank)

    async def _read_index(self, directory: Directory) -> set[str] | None:
        """Return the shard names of the model's index file; ``None`` without a usable one."""
        file = index_file(directory)
        if file is None or not 0 < file.info.size <= INDEX_LIMIT_BYTES:
            return None
        try:
            return parse_index(await read_whole(self._store, self._fetch, file.info))
        except ModelfsError as error:
            log.warning("cannot read %s: %s", file.path, error)
            return None


async def read_whole(store: Store, fetch: Fetch, info: ObjectInfo) -> bytes:
    """Return a small object's bytes through the store.

    Raises:
        ModelfsError: The bytes cannot be had.
    """
    stored = store.object(info)
    data = bytearray(info.size)
    with store.using(stored):
        for index in range(info.chunk_count):
            span = info.chunk_range(index)
            while True:
                view = await fetch.obtain(stored, index, span)
                if view is not None:
                    data[span.start : span.stop] = view
                    break
                pinned = store.pin(stored, span)
                try:
                    target = memoryview(data)[span.start : span.stop]
                    await trio.to_thread.run_sync(
                        store.read_sync, stored, store.descriptor(stored), pinned, span, target
                    )
                    break
                except Exception as error:  # noqa: BLE001 - any failure of the disk is a miss
                    failure = error
                finally:
                    store.unpin(stored, pinned)
                await store.discard(stored, index, str(failure))
    return bytes(data)


def _models(directory: Directory) -> list[Directory]:
    """Return every model at or below ``directory``; parts of a composed model are not models of their own."""
    if is_model(directory):
        return [directory]
    return [model for child in directory.directories() for model in _models(child)]


def wanted_files(node: Node) -> list[File]:
    """Return the files that count for readiness of ``node``: what a start reads, or everything below it."""
    if isinstance(node, File):
        return [node]
    models = _models(node)
    if not models:
        return list(node.walk())
    return [file for model in models for file in model_files(model)]
