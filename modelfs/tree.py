"""From a listing to an immutable directory tree: names, inode numbers, attributes.

Pure and synchronous. Inode numbers are derived from identity (``chunks.stable_number``), so they are
equal after a restart and a changed object is a new inode.

Keys that cannot be a path are not shown, each counted under one reason:
``empty_part`` (a leading, doubled or trailing slash with data behind it), ``dot_part`` (``.`` or ``..``),
``nul``, ``not_text``, ``bad_size``, ``name_too_long`` (a part of more than 255 bytes), ``shadowed`` (a key that is
also the prefix of another: the directory wins), ``filtered`` (include and exclude). An empty key that ends in a slash
is a directory marker and shows as a directory.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelfs.chunks import ObjectInfo, stable_number
from modelfs.config import TreeConfig
from modelfs.layout import as_hub_cache

ROOT_INODE = 1
NAME_MAX_BYTES = 255
SIZE_MAX_BYTES = 2**60


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key in which ``shard-2`` precedes ``shard-10``; engines load in directory order."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


@dataclass(slots=True, eq=False)
class File:
    """A shown object."""

    inode: int
    name: str
    path: str
    info: ObjectInfo
    parent: "Directory"


@dataclass(slots=True, eq=False)
class Directory:
    """A prefix. ``entries`` are in natural order once the tree is built."""

    inode: int
    name: str
    path: str
    parent: "Directory | None" = None
    entries: dict[str, "File | Directory"] = field(default_factory=dict)
    mtime_ns: int = 0

    def files(self) -> list[File]:
        """Return the files directly in this directory, in natural order."""
        return [entry for entry in self.entries.values() if isinstance(entry, File)]

    def directories(self) -> list["Directory"]:
        """Return the directories directly in this one, in natural order."""
        return [entry for entry in self.entries.values() if isinstance(entry, Directory)]

    def walk(self) -> Iterable[File]:
        """Yield every file below, depth first, in natural order."""
        stack = [iter(self.entries.values())]  # keys may nest deeper than calls
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
            elif isinstance(entry, File):
                yield entry
            else:
                stack.append(iter(entry.entries.values()))


Node = File | Directory


@dataclass(frozen=True, slots=True)
class Listing:
    """All objects of one source at one moment.

    ``name`` is the source's directory, empty for the root; ``prefixes`` what is cut off the keys of which origin;
    ``include`` and ``exclude`` are the source's own filters, ``revision`` is what it was asked for at the Hub.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...]
    objects: tuple[ObjectInfo, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    revision: str = ""

    def relative(self, info: ObjectInfo) -> str:
        """Return an object's path below the source."""
        found = (prefix for origin, prefix in self.prefixes if origin == info.id.origin)
        return info.id.key.removeprefix(next((prefix for prefix in found if info.id.key.startswith(prefix)), ""))


class Tree:
    """The directory the mount shows; never changes after it is built.

    Args:
        listings: One per source.
        config: Filters.
    """

    def __init__(self, listings: Iterable[Listing], config: TreeConfig) -> None:
        self.root = Directory(ROOT_INODE, "", "")
        self.nodes: dict[int, Node] = {ROOT_INODE: self.root}
        self.skipped: Counter[str] = Counter()
        self.skipped_examples: dict[str, str] = {}
        self.total_bytes = 0
        shown = Filter(config.include, config.exclude)
        for listing in listings:
            filters = (shown, Filter(listing.include, listing.exclude))
            entries = [
                (_join(listing.name, path), info)
                for info in listing.objects
                if (path := self._path_of(info, listing.relative(info), filters)) is not None
            ]
            if config.layout == "hf":
                entries = as_hub_cache(entries, listing.revision)
            for path, info in entries:
                self._add(path, info)
        self._finish(self.root)

    def _skip(self, reason: str, key: str) -> None:
        self.skipped[reason] += 1
        self.skipped_examples.setdefault(reason, key)

    def _path_of(self, info: ObjectInfo, relative: str, filters: Iterable["Filter"]) -> str | None:
        """Return where an object is shown below its source, with a slash at the end if as a directory; or ``None``."""
        marker = relative.endswith("/") and info.size == 0
        path = relative[:-1] if marker else relative
        if not path:
            if not marker and info.size:
                self._skip("empty_part", info.id.key)
            return None
        reason = _reason_to_skip(path.split("/")) if 0 <= info.size <= SIZE_MAX_BYTES else "bad_size"
        if reason is None and not marker and not all(shown(path) for shown in filters):
            reason = "filtered"
        if reason is not None:
            self._skip(reason, info.id.key)
            return None
        return relative

    def _add(self, path: str, info: ObjectInfo) -> None:
        *directories, name = path.split("/")
        parent = self.root
        for part in directories:
            parent = self._child_directory(parent, part)
        if not name:
            return
        if isinstance(parent.entries.get(name), Directory):
            self._skip("shadowed", info.id.key)
            return
        file = File(info.number, name, path, info, parent)
        parent.entries[name] = file
        self.nodes[file.inode] = file

    def _child_directory(self, parent: Directory, name: str) -> Directory:
        entry = parent.entries.get(name)
        if isinstance(entry, Directory):
            return entry
        if entry is not None:
            self._skip("shadowed", entry.info.id.key)
            del self.nodes[entry.inode]
        path = _join(parent.path, name)
        directory = Directory(stable_number("directory", path), name, path, parent)
        parent.entries[name] = directory
        self.nodes[directory.inode] = directory
        return directory

    def _finish(self, directory: Directory) -> None:
        """Sort entries and carry the newest time upwards; iterative, for keys may nest 500 deep."""
        order = [directory]
        for current in order:
            order.extend(current.directories())
        for current in reversed(order):
            current.entries = dict(sorted(current.entries.items(), key=lambda item: natural_key(item[0])))
            times = [
                entry.info.mtime_ns if isinstance(entry, File) else entry.mtime_ns for entry in current.entries.values()
            ]
            current.mtime_ns = max(times, default=0)
            self.total_bytes += sum(file.info.size for file in current.files())

    def find(self, path: str) -> Node | None:
        """Return the node at ``path`` (relative to the mount, empty for the root), or ``None``."""
        node: Node = self.root
        for part in filter(None, path.split("/")):
            child = node.entries.get(part) if isinstance(node, Directory) else None
            if child is None:
                return None
            node = child
        return node

    @property
    def file_count(self) -> int:
        """Number of files."""
        return sum(isinstance(node, File) for node in self.nodes.values())

    def under(self, path: str) -> list[File]:
        """Return the file at ``path`` or all files below it; empty if nothing is there."""
        node = self.find(path)
        if isinstance(node, File):
            return [node]
        return list(node.walk()) if node else []


def _join(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def _reason_to_skip(parts: list[str]) -> str | None:
    for part in parts:
        if not part:
            return "empty_part"
        if part in {".", ".."}:
            return "dot_part"
        if "\0" in part:
            return "nul"
        try:
            if len(part.encode("utf-8", "surrogateescape")) > NAME_MAX_BYTES:
                return "name_too_long"
        except UnicodeEncodeError:
            return "not_text"
    return None


class Filter:
    """Whether a relative path is shown: it matches one of ``include`` if there are any, and none of ``exclude``."""

    def __init__(self, include: Iterable[str], exclude: Iterable[str]) -> None:
        self._include = [_compile(pattern) for pattern in include]
        self._exclude = [_compile(pattern) for pattern in exclude]

    def __call__(self, path: str) -> bool:
        """Return whether ``path``, relative to its source, is shown."""
        name = path.rpartition("/")[2]
        included = not self._include or any(pattern(path, name) for pattern in self._include)
        return included and not any(pattern(path, name) for pattern in self._exclude)


def _compile(pattern: str) -> "_Match":
    whole = pattern.removeprefix("/") + ("*" if pattern.endswith("/") else "")  # a directory: all below it
    return _Match(re.compile(fnmatch.translate(whole)), "/" in pattern)


@dataclass(frozen=True, slots=True)
class _Match:
    """A glob; one with a slash is matched against the whole path, one without against the file's name."""

    regex: re.Pattern[str]
    whole: bool

    def __call__(self, path: str, name: str) -> bool:
        return bool(self.regex.match(path if self.whole else name))
