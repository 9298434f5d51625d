"""A store below ours that is only read: what an image was baked with, or another store of this machine.

Its complete files are served from where they lie. Nothing in it is ever changed; a file that turns out to be damaged is
fetched anew, into our own store.
"""

import contextlib
import os
from collections import OrderedDict
from pathlib import Path

import lmdb

from modelfs.chunks import ObjectInfo
from modelfs.digests import Verdict
from modelfs.errors import CacheError
from modelfs.store import files
from modelfs.store.index import Index


class Lower:
    """The open lower store.

    Args:
        directory: What ``modelfs get`` filled, or a cache directory that no daemon is using.

    Raises:
        CacheError: There is no store in it.
    """

    def __init__(self, directory: str) -> None:
        found = [path for path in (Path(directory, files.STORE_NAME), Path(directory)) if (path / "index").is_dir()]
        if not found:
            raise CacheError(f"there is no store in {directory}", "fill it with modelfs get, or check --lower-dir")
        self._data = found[0] / "data"
        try:
            self._index = Index(found[0] / "index", readonly=True)
        except lmdb.Error as error:
            raise CacheError(
                f"the store in {directory} cannot be read ({error})", "fill it again: modelfs get"
            ) from error

    def find(self, info: ObjectInfo) -> tuple[Path, OrderedDict[int, bytes], bool, Verdict | None] | None:
        """Return a complete object's data file, checksums, whether it is as it was recorded, and verdict."""
        with contextlib.suppress(lmdb.Error, OSError):
            row = self._index.object(info.number)
            if row is None or row.info.id != info.id or row.info.size != info.size or row.resident != info.size:
                return None
            path = files.data_path(self._data, info.number)
            status = path.stat()
            if status.st_size == info.size and os.access(path, os.R_OK):
                sums = OrderedDict(sorted(self._index.chunks(info.number).items()))
                return path, sums, status.st_mtime_ns == row.stamp, self._index.verdict(info.number)
        return None

    def close(self) -> None:
        """Close the index."""
        self._index.close()
