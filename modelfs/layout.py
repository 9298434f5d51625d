"""The shape of the Hub's cache: ``models--org--name/{refs,snapshots}``, for libraries that look models up by name.

With ``HF_HUB_CACHE`` at the mount and ``HF_HUB_OFFLINE=1``, huggingface_hub finds ``org/name`` as if downloaded.
Pure. A reference is a file whose content is the commit: it lies in no bucket, its version is its content (``INLINE``).
"""

import hashlib
import re
from collections.abc import Iterable

from modelfs.chunks import ObjectId, ObjectInfo

INLINE = "modelfs:inline"
"""The origin of files whose bytes are the version that their identity names."""
_COMMIT = re.compile("[0-9a-f]{40}")

Entries = list[tuple[str, ObjectInfo]]
"""Paths and what lies there."""


def as_hub_cache(entries: Entries, revision: str) -> Entries:
    """Return where files lie in the Hub's cache.

    Args:
        entries: Files under ``org/name/``; others are not of a model and left out.
        revision: Also the name of a reference, besides ``main``; empty: none.
    """
    models: dict[tuple[str, str], Entries] = {}
    for path, info in entries:
        parts = path.split("/", 2)
        if len(parts) == 3:
            models.setdefault((parts[0], parts[1]), []).append((parts[2], info))
    return [
        entry
        for (organisation, name), files in models.items()
        for entry in _model(f"models--{organisation}--{name}", files, revision)
    ]


def _model(top: str, files: Entries, revision: str) -> Iterable[tuple[str, ObjectInfo]]:
    commit = commit_of(files)
    for reference in {"main", revision} - {"", commit}:
        path = f"{top}/refs/{reference}"
        yield path, ObjectInfo(ObjectId(INLINE, path, commit), len(commit), max(info.mtime_ns for _, info in files))
    for path, info in files:
        yield f"{top}/snapshots/{commit}/{path}", info


def commit_of(files: Entries) -> str:
    """Return the commit that the Hub says files are of; of others a name that changes with each of them."""
    located = {info.locator for _, info in files}
    if len(located) == 1 and _COMMIT.fullmatch(next(iter(located))):
        return located.pop()
    lines = sorted(f"{path}\0{info.number}\0{info.size}" for path, info in files)
    return hashlib.sha1("\n".join(lines).encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
