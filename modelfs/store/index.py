"""The store's LMDB index: what lies in the data files, under which identity and checksums.

Tables: ``meta`` (format version), ``objects`` (number → identity, size, time of last use, resident
bytes), ``chunks`` (number + chunk → one xxh3-64 per piece), ``lru`` (time + number, the order of
eviction), ``listings`` (source → the last good listing, which a restarted worker begins with), ``traces``
(name → the order of a load) and ``verdicts`` (number → what hashing the whole object showed).

Knows no file and no policy. Reads may run on any thread; writes come from one thread at a time.
"""

import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.digests import Digest, Verdict
from modelfs.errors import CacheError

FORMAT_VERSION = 1
MAX_TRACES = 256
_MAP_BYTES = 4 * 1024**3
"""Address space, not memory or disk: 100 bytes per 8 MiB chunk index 300 TB."""
_NUMBER = struct.Struct(">Q")
_CHUNK = struct.Struct(">QI")
_LRU = struct.Struct(">QQ")
_RESIDENT = b"resident_bytes"


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """What the index holds of one object version; ``used`` is in whole seconds since the epoch.

    ``stamp`` is the data file's st_mtime_ns when its last chunk was recorded.
    """

    info: ObjectInfo
    used: int
    resident: int
    stamp: int = 0


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk whose bytes are durable and may be recorded."""

    info: ObjectInfo
    index: int
    sums: bytes


class Index:
    """The open index.

    Args:
        path: Directory of the LMDB environment; made if missing.
        readonly: Only look, also where another worker has it open or the disk has become read-only.

    Raises:
        CacheError: The index was written by another format version.
        lmdb.Error: The index is damaged.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        if not readonly:
            path.mkdir(mode=0o700, exist_ok=True)
        self._env = lmdb.open(
            str(path), map_size=_MAP_BYTES, max_dbs=7, mode=0o600, readonly=readonly, lock=not readonly
        )
        self._env.reader_check()
        names = (b"meta", b"objects", b"chunks", b"lru", b"listings", b"traces", b"verdicts")
        databases = map(self._env.open_db, names)
        self._meta, self._objects, self._chunks, self._lru, self._listings, self._traces, self._verdicts = databases
        with self._env.begin(write=not readonly) as txn:
            version = txn.get(b"format", db=self._meta)
            if version is None:
                if not readonly:
                    txn.put(b"format", str(FORMAT_VERSION).encode(), db=self._meta)
            elif version != str(FORMAT_VERSION).encode():
                raise CacheError(
                    f"{path} has index format {version.decode(errors='replace')}, this modelfs knows {FORMAT_VERSION}",
                    "use another --cache-dir, or remove that cache directory",
                )

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    # -- reading ------------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Return the sum of all recorded chunks' lengths."""
        with self._env.begin() as txn:
            return int(txn.get(_RESIDENT, b"0", db=self._meta))

    def object(self, number: int) -> ObjectRow | None:
        """Return the row of one object, or ``None``."""
        with self._env.begin() as txn:
            value = txn.get(_NUMBER.pack(number), db=self._objects)
            return _decode(bytes(value)) if value is not None else None

    def chunks(self, number: int) -> dict[int, bytes]:
        """Return ``{chunk: checksums}`` of one object."""
        prefix, found = _NUMBER.pack(number), {}
        with self._env.begin() as txn, txn.cursor(db=self._chunks) as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor:
                    if not key.startswith(prefix):
                        break
                    found[_CHUNK.unpack(key)[1]] = bytes(value)
        return found

    def least_recent(self, limit: int, after: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
        """Return up to ``limit`` pairs ``(used, number)``, least recently used first, beyond ``after``."""
        found: list[tuple[int, int]] = []
        with self._env.begin() as txn, txn.cursor(db=self._lru) as cursor:
            if cursor.set_range(_LRU.pack(*after)):
                for key in cursor.iternext(values=False):
                    pair = _LRU.unpack(key)
                    if pair > after:
                        found.append((pair[0], pair[1]))
                    if len(found) >= limit:
                        break
        return found

    def numbers(self) -> set[int]:
        """Return the numbers of all objects."""
        with self._env.begin() as txn, txn.cursor(db=self._objects) as cursor:
            return {_NUMBER.unpack(key)[0] for key in cursor.iternext(values=False)}

    def verdict(self, number: int) -> Verdict | None:
        """Return what hashing an object showed, or ``None``."""
        with self._env.begin() as txn:
            value = txn.get(_NUMBER.pack(number), db=self._verdicts)
        if value is None:
            return None
        state, digest = json.loads(bytes(value))
        return Verdict(state, Digest(*digest) if digest else None)

    def listing(self, source: str) -> list[ObjectInfo] | None:
        """Return the listing saved for a source, or ``None``."""
        with self._env.begin() as txn:
            value = txn.get(_listing_key(source), db=self._listings)
        if value is None:
            return None
        origins, rows = json.loads(zlib.decompress(bytes(value)))
        try:
            return [ObjectInfo(ObjectId(origins[at], key, version), *more) for at, key, version, *more in rows]
        except (TypeError, ValueError):
            return None  # an earlier modelfs wrote it otherwise

    def trace(self, name: str) -> bytes | None:
        """Return the text of a trace, or ``None``."""
        with self._env.begin() as txn:
            value = txn.get(name.encode(), db=self._traces)
        return zlib.decompress(bytes(value)) if value is not None else None

    # -- writing ------------------------------------------------------------------------------------

    def save_trace(self, name: str, text: bytes) -> None:
        """Keep a trace; beyond ``MAX_TRACES`` others are dropped for it."""
        with self._env.begin(write=True) as txn:
            with txn.cursor(db=self._traces) as cursor:
                while txn.stat(self._traces)["entries"] >= MAX_TRACES and cursor.first():
                    cursor.delete()
            txn.put(name.encode(), zlib.compress(text, 1), db=self._traces)

    def save_verdict(self, number: int, verdict: Verdict, stamp: int | None) -> None:
        """Keep what hashing an object showed, until a chunk is recorded or forgotten; and a new stamp, if any."""
        digest = verdict.digest
        value = [verdict.state, [digest.algorithm, digest.value, digest.source] if digest else None]
        with self._env.begin(write=True) as txn:
            txn.put(_NUMBER.pack(number), json.dumps(value).encode(), db=self._verdicts)
            row = self._row(txn, number)
            if row is not None and stamp is not None:
                txn.put(_NUMBER.pack(number), _encode(replace(row, stamp=stamp)), db=self._objects)

    def record(self, chunks: Iterable[NewChunk], used: dict[int, int], stamps: dict[int, int]) -> None:
        """Record durable chunks, times of use and the data files' stamps in one durable transaction."""
        with self._env.begin(write=True) as txn:
            total = int(txn.get(_RESIDENT, b"0", db=self._meta))
            rows: dict[int, ObjectRow] = {}
            for chunk in chunks:
                number = chunk.info.number
                txn.delete(_NUMBER.pack(number), db=self._verdicts)
                row = rows.get(number) or self._row(txn, number) or ObjectRow(chunk.info, 0, 0)
                grown = 0
                if txn.put(_CHUNK.pack(number, chunk.index), chunk.sums, db=self._chunks, overwrite=False):
                    grown = len(chunk.info.chunk_range(chunk.index))
                else:
                    txn.put(_CHUNK.pack(number, chunk.index), chunk.sums, db=self._chunks)
                rows[number] = replace(row, resident=row.resident + grown, stamp=stamps.get(number, row.stamp))
                total += grown
            for number, moment in used.items():
                known = rows.get(number) or self._row(txn, number)
                if known is not None:
                    txn.delete(_LRU.pack(known.used, number), db=self._lru)
                    rows[number] = replace(known, used=moment)
            for number, row in rows.items():
                txn.put(_LRU.pack(row.used, number), b"", db=self._lru)
                txn.put(_NUMBER.pack(number), _encode(row), db=self._objects)
            txn.put(_RESIDENT, str(total).encode(), db=self._meta)

    def forget(self, number: int, chunks: Iterable[int]) -> None:
        """Remove chunk records; remove the object with its last one."""
        with self._env.begin(write=True) as txn:
            txn.delete(_NUMBER.pack(number), db=self._verdicts)
            row = self._row(txn, number)
            if row is None:
                return
            shrunk = sum(
                len(row.info.chunk_range(index))
                for index in chunks
                if txn.delete(_CHUNK.pack(number, index), db=self._chunks)
            )
            if row.resident - shrunk <= 0:
                txn.delete(_LRU.pack(row.used, number), db=self._lru)
                txn.delete(_NUMBER.pack(number), db=self._objects)
            else:
                txn.put(
                    _NUMBER.pack(number),
                    _encode(replace(row, resident=row.resident - shrunk)),
                    db=self._objects,
                )
            total = int(txn.get(_RESIDENT, b"0", db=self._meta)) - shrunk
            txn.put(_RESIDENT, str(total).encode(), db=self._meta)

    def save_listing(self, source: str, objects: list[ObjectInfo]) -> None:
        """Keep a listing for the next worker."""
        origins = sorted({info.id.origin for info in objects})
        rows = [
            (origins.index(info.id.origin), info.id.key, info.id.version, info.size, info.mtime_ns, info.locator)
            for info in objects
        ]
        value = zlib.compress(json.dumps([origins, rows]).encode(), 1)
        with self._env.begin(write=True) as txn:
            txn.put(_listing_key(source), value, db=self._listings)

    def _row(self, txn: lmdb.Transaction, number: int) -> ObjectRow | None:
        value = txn.get(_NUMBER.pack(number), db=self._objects)
        return _decode(bytes(value)) if value is not None else None


def _listing_key(source: str) -> bytes:
    """LMDB keys end at 511 bytes, sources do not."""
    return source.encode()[:256] + b"#" + str(zlib.crc32(source.encode())).encode()


def _encode(row: ObjectRow) -> bytes:
    identity = row.info.id
    return json.dumps(
        [
            identity.origin,
            identity.key,
            identity.version,
            row.info.size,
            row.info.mtime_ns,
            row.used,
            row.resident,
            row.stamp,
        ]
    ).encode()


def _decode(value: bytes) -> ObjectRow:
    origin, key, version, size, mtime_ns, used, resident, stamp = json.loads(value)
    return ObjectRow(ObjectInfo(ObjectId(origin, key, version), size, mtime_ns), used, resident, stamp)
