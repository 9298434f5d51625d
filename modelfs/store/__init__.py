"""The local store: which chunks of which object versions lie on this disk, and their bytes.

State is owned by the trio loop: methods without ``_sync`` run there and never block for long; those
with ``_sync`` are called in worker threads and touch only files and the index. Bytes are served as soon
as they are written (their checksum is in memory); a chunk is recorded in the index only after
``fdatasync``, many at a time. A record whose bytes fail the checksum is dropped, counted and fetched
again. Nothing is deleted at start, and start does not depend on the number of cached bytes.

INVARIANT: ``resident_bytes + reserved_bytes`` never exceeds the limit by more than what was reserved
before the limit shrank (another process filled the disk).
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import lmdb
import trio

from modelfs.chunks import CHUNK_BYTES, MIB, PIECE_BYTES, ByteRange, ObjectInfo, chunks_of
from modelfs.config import StoreConfig
from modelfs.digests import BAD, Verdict
from modelfs.errors import CacheBusyError, CacheError
from modelfs.logs import Seldom
from modelfs.metrics import Metrics
from modelfs.store import files
from modelfs.store.files import CorruptChunkError
from modelfs.store.index import Index, NewChunk
from modelfs.store.lower import Lower

__all__ = ["Chunk", "CorruptChunkError", "Store", "StoredObject"]

log = logging.getLogger(__name__)

COMMIT_SECONDS = 0.5
"""How long finished chunks gather before one fdatasync and one transaction serve them all."""
_USE_GRANULARITY_SECONDS = 1
_SPACE_CHECK_SECONDS = 1.0
_COMPLAINT_SECONDS = 60.0
_Found = TypeVar("_Found")


@dataclass(slots=True, eq=False)
class Chunk:
    """A resident chunk. ``verified`` has a bit for every piece that this process has read back and found whole."""

    sums: bytes
    verified: int
    durable: bool
    pins: int = 0

    @property
    def all_verified(self) -> bool:
        """Whether every piece has been checked by this process."""
        return self.verified == (1 << (len(self.sums) // files.SUM_BYTES)) - 1


@dataclass(slots=True, eq=False)
class StoredObject:
    """The store's view of one object version.

    ``chunks`` is in order of last use once the object is open. ``users`` counts opens and downloads;
    ``passed`` says that the kernel reads the file without us, so that no hole may be punched; ``copied`` that
    it is open and its readers get their bytes through us; ``untouched`` that nobody but modelfs has written the
    data file since its chunks were recorded. ``verdict`` is what hashing exactly these bytes showed; ``changes`` counts
    chunks that have come and gone, for whoever looks at all of them one after the other. ``lower`` is the data file in
    the store below, where all of it lies there.
    """

    info: ObjectInfo
    chunks: OrderedDict[int, Chunk]
    users: int = 0
    passed: bool = False
    copied: bool = False
    untouched: bool = True
    verdict: Verdict | None = None
    changes: int = 0
    descriptor: int = -1
    lower: Path | None = None
    lower_mtime_ns: int = 0
    evicting: set[int] = field(default_factory=set)
    resident_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether every byte is resident."""
        return self.resident_bytes == self.info.size

    @property
    def sound(self) -> bool:
        """Whether nobody else has written the data file, or all of it has been checked since."""
        return self.untouched or all(chunk.all_verified for chunk in self.chunks.values())

    def missing(self, span: ByteRange) -> list[int]:
        """Return the chunks of ``span`` that are not resident."""
        return [index for index in chunks_of(span) if index not in self.chunks]


class Store:
    """The open store of one cache directory.

    ``on_complete`` and ``on_evict`` are whom to tell when a file's last chunk has come, and which chunks are gone.

    Args:
        config: Directory and limits.
        metrics: Gauges and counters.
        holder: Who opens it, for the message to the next one who tries.
        budget: Bytes in flight that eviction keeps room for.
        keeps: ``False``: keep nothing, whatever the limits; every read is served from memory.

    Raises:
        CacheError: Not writable, held by another daemon, or of another format.
    """

    def __init__(self, *, config: StoreConfig, metrics: Metrics, holder: str, budget: int, keeps: bool = True) -> None:
        self.directory = Path(config.cache_dir)
        self._config = config
        self._budget = budget
        self._keeps = keeps
        self._metrics = metrics
        files.prepare(self.directory)
        self._lock = self._take_lock(holder)
        self.data_directory = self.directory / "data"
        files.prepare(self.data_directory)
        self._index = self._open_index()
        self._lower = Lower(config.lower_dir) if config.lower_dir else None
        self._retired: list[int] = []
        self._objects: dict[int, StoredObject] = {}
        self._dirty: dict[tuple[int, int], tuple[StoredObject, Chunk]] = {}
        self._used: dict[int, int] = {}
        self._used_known: dict[int, int] = {}
        self._dirty_event = trio.Event()
        self._commit_lock = trio.Lock()
        self._unforgotten: dict[int, set[int]] = {}
        self.resident_bytes = self._index.resident_bytes()
        self.reserved_bytes = 0
        self.evicted_bytes = 0
        self.pressure = trio.Event()
        self.on_complete: list[Callable[[StoredObject], None]] = []
        self.on_evict: list[Callable[[StoredObject, list[int]], None]] = []
        self.disk_error = ""
        self._seldom = Seldom(_COMPLAINT_SECONDS)
        self.demand_waits = False
        self.room_since = 0.0
        self._disk_limit = 0
        self._space_checked = 0.0
        self.refresh_space()

    def check_room(self) -> None:
        """Make sure that the cache can hold anything at all.

        Raises:
            CacheError: It is too small.
        """
        if self.limit_bytes < CHUNK_BYTES and self.resident_bytes == 0:
            raise CacheError(
                f"the cache in {self.directory} may hold {max(0, self.limit_bytes) // MIB} MiB, less than one chunk",
                f"raise --cache-size, lower --min-free or free space: {CHUNK_BYTES // MIB} MiB is the least",
            )

    # -- opening and closing ------------------------------------------------------------------------

    def _take_lock(self, holder: str) -> int:
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise CacheBusyError(
                f"cache directory {self.directory} is in use by {other}", "give this mount its own --cache-dir"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} ({holder})\n".encode(), 0)
        return descriptor

    def _open_index(self) -> Index:
        path = self.directory / "index"
        try:
            return Index(path)
        except lmdb.Error as error:
            aside = self.directory / f"index.damaged-{int(time.time())}"
            log.error("index %s is damaged (%s): set aside as %s, the cache starts empty", path, error, aside)
            path.rename(aside)
            return Index(path)

    def close(self) -> None:
        """Close every file; uncommitted chunks are lost, which ``run`` prevents when it is cancelled."""
        for stored in self._objects.values():
            if stored.descriptor >= 0:
                os.close(stored.descriptor)
                stored.descriptor = -1
        for descriptor in self._retired:
            os.close(descriptor)
        if self._lower is not None:
            self._lower.close()
        self._index.close()
        os.close(self._lock)

    @property
    def limit_bytes(self) -> int:
        """Largest allowed size now: the configured cap, or what the disk has above the floor."""
        return self._disk_limit

    @property
    def headroom_bytes(self) -> int:
        """What eviction keeps free below the limit for bytes in flight."""
        return max(0, min(self._budget, self._disk_limit // 4))

    def refresh_space(self) -> None:
        """Look at the disk again; one that cannot be asked is as it was."""
        self._space_checked = time.monotonic()
        try:
            room = os.statvfs(self.directory)
        except OSError as error:
            self.disk_error = str(error.strerror)
            return
        total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
        cap = self._config.cache_size.of(total)
        # Bytes reserved but not yet written are still free: counting them as well would undercut the floor.
        available = self.resident_bytes + free - self._config.min_free.of(total)
        self._disk_limit = min(cap, available) if self._keeps else 0
        self._metrics.store_limit.set(self._disk_limit)
        self._metrics.store_bytes.set(self.resident_bytes)

    # -- objects ------------------------------------------------------------------------------------

    def object(self, info: ObjectInfo) -> StoredObject:
        """Return the store's view of ``info``, loaded from the index the first time."""
        stored = self._objects.get(info.number)
        if stored is None:
            stored = self._look_up(lambda: self._load(info)) or StoredObject(info, OrderedDict())
            self._objects[info.number] = stored
        return stored

    def _load(self, info: ObjectInfo) -> StoredObject:
        row = self._index.object(info.number)
        if row is None and (found := self._load_lower(info)) is not None:
            return found
        if row is None or row.info.id != info.id or row.info.size != info.size:
            return StoredObject(info, OrderedDict())
        recorded = self._index.chunks(info.number)
        status = self._data_file_status(info)
        if recorded and (status is None or status.st_size != info.size):
            log.warning("data file of %s is missing or has the wrong size: fetched again", info.id.key)
            self._index.forget(info.number, list(recorded))
            self.resident_bytes -= row.resident
            return StoredObject(info, OrderedDict())
        chunks = OrderedDict((index, Chunk(sums, 0, durable=True)) for index, sums in recorded.items())
        self._used_known[info.number] = row.used
        resident = sum(len(info.chunk_range(index)) for index in chunks)
        untouched = status is not None and status.st_mtime_ns == row.stamp
        stored = StoredObject(info, chunks, resident_bytes=resident, untouched=untouched)
        if stored.complete:
            stored.verdict = self._index.verdict(info.number)
        return stored

    def _load_lower(self, info: ObjectInfo) -> StoredObject | None:
        """Return an object that lies complete in the store below."""
        found = self._lower.find(info) if self._lower is not None and info.size else None
        own = self._index.verdict(info.number)
        if found is None or (own is not None and own.state == BAD):
            return None
        path, sums, mtime_ns, untouched, verdict = found
        chunks = OrderedDict((index, Chunk(one, 0, durable=True)) for index, one in sums.items())
        stored = StoredObject(info, chunks, resident_bytes=info.size, untouched=untouched, lower=path)
        stored.lower_mtime_ns = mtime_ns
        stored.verdict = verdict or own
        return stored

    def _leave_lower(self, stored: StoredObject) -> None:
        """Go on with an object in our own store: what lies below is damaged. Readers may still hold its descriptor."""
        log.error("%s below is damaged: fetched anew", stored.lower)
        with contextlib.suppress(lmdb.Error):  # the next worker shall not begin with it again
            self._index.save_verdict(stored.info.number, Verdict(BAD), None)
        if stored.descriptor >= 0:
            self._retired.append(stored.descriptor)
            stored.descriptor = -1
        for tell in self.on_evict:
            tell(stored, list(stored.chunks))
        stored.chunks.clear()
        stored.lower, stored.verdict, stored.untouched, stored.resident_bytes = None, None, True, 0
        stored.changes += 1

    def _look_up(self, ask: Callable[[], _Found]) -> _Found | None:
        """Return what the index says, or ``None`` where it cannot be read."""
        try:
            return ask()
        except lmdb.Error as error:
            if self._seldom("read"):
                log.error("the index in %s cannot be read (%s): what it knows is fetched anew", self.directory, error)
            return None

    def _data_file_status(self, info: ObjectInfo) -> os.stat_result | None:
        try:
            return self.data_path(info).stat()
        except OSError:
            return None

    def data_path(self, info: ObjectInfo) -> Path:
        """Return the data file of an object, there or not."""
        return files.data_path(self.data_directory, info.number)

    def known_object(self, number: int) -> ObjectInfo | None:
        """Return the identity behind a number that is no longer in any listing, if the index has it."""
        row = self._look_up(lambda: self._index.object(number))
        return row.info if row else None

    @contextlib.contextmanager
    def using(self, stored: StoredObject) -> Iterator[None]:
        """Keep ``stored`` from idle eviction and its file open while in the block."""
        self.acquire(stored)
        try:
            yield
        finally:
            self.release(stored)

    def acquire(self, stored: StoredObject) -> None:
        """Count one more open or download of the object."""
        stored.users += 1

    def release(self, stored: StoredObject) -> None:
        """Take back one ``acquire``; the last one closes the data file."""
        stored.users -= 1
        if stored.users == 0:
            self._close_descriptor(stored)

    def _close_descriptor(self, stored: StoredObject) -> None:
        """Close the data file unless a reader or the next commit still needs it."""
        if stored.descriptor >= 0 and not any(chunk.pins or not chunk.durable for chunk in stored.chunks.values()):
            os.close(stored.descriptor)
            stored.descriptor = -1

    def descriptor(self, stored: StoredObject) -> int:
        """Return the descriptor of the data file, opened if needed.

        Raises:
            OSError: The file cannot be opened.
        """
        if stored.descriptor < 0:
            if stored.lower is not None:
                stored.descriptor = os.open(stored.lower, os.O_RDONLY | os.O_CLOEXEC)
            else:
                stored.descriptor = files.open_data(self.data_path(stored.info), stored.info.size)
        return stored.descriptor

    def touch(self, stored: StoredObject, indices: range) -> None:
        """Note that chunks were used; coarse in time."""
        for index in indices:
            if index in stored.chunks:
                stored.chunks.move_to_end(index)
        now = int(time.time())
        number = stored.info.number
        if now - self._used_known.get(number, 0) >= _USE_GRANULARITY_SECONDS:
            self._used_known[number] = now
            self._used[number] = now

    # -- reading ------------------------------------------------------------------------------------

    def pin(self, stored: StoredObject, span: ByteRange) -> list[Chunk]:
        """Forbid eviction of the resident chunks of ``span`` until ``unpin``; return them in order."""
        pinned = [stored.chunks[index] for index in chunks_of(span)]
        for chunk in pinned:
            chunk.pins += 1
        return pinned

    def unpin(self, stored: StoredObject, pinned: list[Chunk]) -> None:
        """Take back one ``pin``."""
        for chunk in pinned:
            chunk.pins -= 1
        if stored.users == 0:
            self._close_descriptor(stored)

    def read_sync(
        self, stored: StoredObject, descriptor: int, pinned: list[Chunk], span: ByteRange, target: memoryview
    ) -> None:
        """Fill ``target`` with the resident bytes of ``span``, checking pieces not checked before.

        Called in a worker thread; ``pinned`` is what ``pin`` returned for ``span``.

        Raises:
            CorruptChunkError: The bytes on disk are not the ones recorded.
            OSError: The disk failed.
        """
        for chunk, index in zip(pinned, chunks_of(span), strict=True):
            whole = stored.info.chunk_range(index)
            part = ByteRange(max(span.start, whole.start), min(span.stop, whole.stop))
            view = target[part.start - span.start : part.stop - span.start]
            mask = _piece_mask(whole, part)
            if chunk.verified & mask == mask:
                files.read_at(descriptor, view, part.start)
            else:
                files.read_verified(descriptor, whole, chunk.sums, part, view)
                chunk.verified |= mask

    async def discard(self, stored: StoredObject, index: int, why: str) -> None:
        """Drop a chunk whose bytes are wrong; it becomes a miss."""
        chunk = stored.chunks.get(index)
        if chunk is None:
            return
        log.error("chunk %d of %s is damaged on disk (%s): dropped and fetched again", index, stored.info.id.key, why)
        self._metrics.store_corrupt.inc()
        await self.evict(stored, [index], "corrupt", force=True)

    # -- writing ------------------------------------------------------------------------------------

    def reserve(self, size: int, *, since: float | None = None) -> bool:
        """Set ``size`` bytes aside for a chunk to be written; ``False`` if there is no room now.

        Args:
            size: The chunk's length.
            since: For a download ahead of readers: when it was asked for, in seconds since the epoch. It keeps
                below the high watermark, and room is made for it only by evicting what was not used since then;
                so that it can push out neither open files nor, in a loop, itself.
        """
        if time.monotonic() - self._space_checked > _SPACE_CHECK_SECONDS:
            self.refresh_space()
        taken = self.resident_bytes + self.reserved_bytes + size
        above = taken - (self.limit_bytes - self.headroom_bytes)
        if above > 0:
            self.pressure.set()
            if since is None:
                self.demand_waits = True
            else:
                self.room_since = max(self.room_since, since)
        if taken > self.limit_bytes or (above > 0 and since is not None):
            return False
        self.reserved_bytes += size
        return True

    def unreserve(self, size: int) -> None:
        """Give a reservation back."""
        self.reserved_bytes -= size

    def write_sync(self, stored: StoredObject, index: int, data: memoryview) -> None:
        """Write a chunk's bytes, around the page cache where possible. Called in a worker thread.

        Raises:
            OSError: The disk is full or broken.
        """
        path = self.data_path(stored.info)
        files.write_chunk(path, stored.info.size, data, stored.info.chunk_range(index).start)

    def added(self, stored: StoredObject, index: int, sums: bytes) -> None:
        """Take a written, reserved chunk as resident; it is served from now on and recorded soon."""
        size = len(stored.info.chunk_range(index))
        self.disk_error = ""
        self.reserved_bytes -= size
        if index in stored.chunks:
            return
        chunk = Chunk(sums, 0, durable=False)  # what a disk was given it need not give back
        stored.chunks[index] = chunk
        stored.verdict = None
        stored.changes += 1
        stored.resident_bytes += size
        self.resident_bytes += size
        self._metrics.store_bytes.set(self.resident_bytes)
        self._dirty[stored.info.number, index] = (stored, chunk)
        if stored.info.number not in self._used_known:
            self.touch(stored, range(0))
        self._dirty_event.set()
        if stored.complete:
            for tell in self.on_complete:
                tell(stored)

    @property
    def skip_reason(self) -> str:
        """Why there is no room for a chunk: the word for the metric."""
        return "no_room" if self._keeps else "disk_error"

    def disk_failed(self, error: OSError) -> str:
        """Note a failed write; return the reason word for the metric."""
        self.refresh_space()
        self.pressure.set()
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        self.disk_error = str(error.strerror)
        if self._seldom(error.errno):
            log.error("the cache disk at %s failed (%s): reads go on without it", self.directory, error.strerror)
        return "disk_full" if full else "disk_error"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit finished chunks until cancelled, then commit once more."""
        task_status.started()
        try:
            while True:
                with trio.move_on_after(5):
                    await self._dirty_event.wait()
                await trio.sleep(COMMIT_SECONDS)
                self._dirty_event = trio.Event()
                await self.commit()
        finally:
            with trio.move_on_after(2, shield=True):
                await self.commit()

    async def commit(self) -> None:
        """Make all written chunks durable and record them."""
        async with self._commit_lock:
            dirty, used = self._dirty, self._used
            if not dirty and not used:
                return
            self._dirty, self._used = {}, {}
            objects = {stored.info.number: stored for stored, _ in dirty.values()}
            for stored in objects.values():
                self.acquire(stored)  # keeps the descriptors open, and eviction away
            try:
                await self._commit_batch(objects, dirty, used)
            except (OSError, lmdb.Error) as error:
                if self._seldom("index"):
                    log.error("the index in %s could not be written (%s): tried again", self.directory, error)
                # What was evicted meanwhile is not recorded any more.
                again = {key: entry for key, entry in dirty.items() if entry[0].chunks.get(key[1]) is entry[1]}
                self._dirty, self._used = again | self._dirty, used | self._used
            finally:
                for stored in objects.values():
                    self.release(stored)

    async def _commit_batch(
        self,
        objects: dict[int, StoredObject],
        dirty: dict[tuple[int, int], tuple[StoredObject, Chunk]],
        used: dict[int, int],
    ) -> None:
        descriptors = {number: self.descriptor(stored) for number, stored in objects.items()}
        chunks = [NewChunk(stored.info, index, chunk.sums) for (_, index), (stored, chunk) in dirty.items()]
        await trio.to_thread.run_sync(self._commit_sync, descriptors, chunks, used)
        evicted: dict[int, list[int]] = {}
        for (number, index), (stored, chunk) in dirty.items():
            chunk.durable = True
            if stored.chunks.get(index) is not chunk:
                evicted.setdefault(number, []).append(index)
        for number, indices in evicted.items():
            await trio.to_thread.run_sync(self._index.forget, number, indices)

    def _commit_sync(self, descriptors: dict[int, int], chunks: list[NewChunk], used: dict[int, int]) -> None:
        """Record what is durable, and each file's time of change.

        Only we write the file: an equal time at the next start says that nobody else did. A file that somebody else
        did write has no such time any more.
        """
        self._forget_sync()
        stamps = {}
        for number, descriptor in descriptors.items():
            stamps[number] = os.fstat(descriptor).st_mtime_ns if self._objects[number].sound else 0
            os.fdatasync(descriptor)
        self._index.record(chunks, used, stamps)

    async def judge(self, stored: StoredObject, verdict: Verdict, changes: int) -> None:
        """Keep what hashing a complete object showed, until one of its chunks is another.

        ``changes`` is what it was when the hashing began: a chunk may have been replaced meanwhile.
        """
        await self.commit()
        async with self._commit_lock:
            if not stored.complete or stored.changes != changes:
                return
            stored.verdict = verdict
            stamp = None
            if not stored.untouched and stored.sound:  # hashing has looked at every piece
                stored.untouched, stamp = True, self._stamp(stored)
            if stored.chunks and all(chunk.durable for chunk in stored.chunks.values()):
                try:
                    await trio.to_thread.run_sync(self._index.save_verdict, stored.info.number, verdict, stamp)
                except lmdb.Error as error:
                    log.warning("what was verified cannot be kept in %s: %s", self.directory, error)

    def _stamp(self, stored: StoredObject) -> int | None:
        status = self._data_file_status(stored.info)
        return status.st_mtime_ns if status is not None else None

    # -- eviction -----------------------------------------------------------------------------------

    async def evict(self, stored: StoredObject, indices: list[int], reason: str, *, force: bool = False) -> int:
        """Remove chunks; return bytes freed.

        Pinned chunks and those of passed-through files stay, unless forced. Forced ones are only forgotten:
        a reader that holds a pin must not meet a hole, and the next download overwrites them in place.
        """
        if stored.lower is not None:
            if force:
                self._leave_lower(stored)
            return 0
        victims = []
        for index in indices:
            chunk = stored.chunks.get(index)
            if chunk is None or (not force and (chunk.pins or stored.passed)) or index in stored.evicting:
                continue
            # No checkpoint between this check and the removal: a reader after it sees a miss.
            del stored.chunks[index]
            stored.verdict = None
            stored.changes += 1
            self._dirty.pop((stored.info.number, index), None)
            stored.evicting.add(index)
            stored.resident_bytes -= len(stored.info.chunk_range(index))
            victims.append(index)
        if not victims:
            return 0
        for tell in self.on_evict:
            tell(stored, victims)
        with trio.CancelScope(shield=True):
            async with self._commit_lock:
                try:
                    await trio.to_thread.run_sync(self._evict_sync, stored, victims, not force)
                except (OSError, lmdb.Error) as error:
                    if self._seldom("evict"):
                        log.error("cannot evict from %s: %s", self.directory, error)
                finally:
                    stored.evicting.difference_update(victims)
        # No checkpoint between this check and the unlink: whoever opens the file next makes a new one.
        if not stored.chunks and not stored.users and not stored.evicting:
            self._close_descriptor(stored)
            self._unlink(stored.info.number)
            stored.untouched = True
        freed = sum(len(stored.info.chunk_range(index)) for index in victims)
        self.resident_bytes -= freed
        self.evicted_bytes += freed
        self._metrics.store_evicted.labels(reason=reason).inc(freed)
        self._metrics.store_bytes.set(self.resident_bytes)
        return freed

    def _unlink(self, number: int) -> None:
        try:
            files.data_path(self.data_directory, number).unlink(missing_ok=True)
        except OSError as error:
            if self._seldom("unlink"):
                log.error("cannot remove a file from %s: %s", self.data_directory, error.strerror)

    def _evict_sync(self, stored: StoredObject, victims: list[int], punch: bool) -> None:
        """Forget first, punch second: a crash in between leaves unrecorded bytes, never a record without bytes.

        But for a disk so full that the index cannot be written: there room is made first. The file's changed time and
        the checksums then tell of what is gone.
        """
        path = self.data_path(stored.info)
        spans = [stored.info.chunk_range(index) for index in victims] if punch else []
        try:
            self._index.forget(stored.info.number, victims)
        except lmdb.Error:
            self._unforgotten.setdefault(stored.info.number, set()).update(victims)
            files.punch(path, spans)
            self._forget_sync()
        else:
            files.punch(path, spans)

    def _forget_sync(self) -> None:
        """Remove records that could not be removed when their bytes went; before anything else is recorded."""
        for number, indices in list(self._unforgotten.items()):
            self._index.forget(number, indices)
            del self._unforgotten[number]

    def least_recent(self, limit: int, after: tuple[int, int]) -> list[tuple[int, int]]:
        """Return ``(used, number)`` pairs in order of eviction; see ``Index.least_recent``."""
        return self._index.least_recent(limit, after)

    def evictable(self, number: int) -> StoredObject | None:
        """Return the object behind a number of the index, loaded if needed."""
        stored = self._objects.get(number)
        if stored is not None:
            return stored
        info = self.known_object(number)
        return self.object(info) if info is not None else None

    def numbers(self) -> set[int]:
        """Return the numbers of all objects in the index."""
        return self._look_up(self._index.numbers) or set()

    def in_use(self) -> list[StoredObject]:
        """Return the objects that are open or downloading and hold chunks."""
        return [stored for stored in self._objects.values() if stored.users and stored.chunks]

    # -- recovery -----------------------------------------------------------------------------------

    def backing_descriptor(self, stored: StoredObject) -> int | None:
        """Return a new read-only descriptor of a complete, trusted data file, or ``None``.

        Trusted: written by this process or recorded durably, and not touched since, or checked by this process. Beyond
        that point a passed-through file is as sound as any file on that disk.
        """
        if not stored.info.size or not stored.complete or stored.evicting:
            return None
        if not stored.sound:
            return None
        try:
            if stored.lower is not None and stored.lower.stat().st_mtime_ns != stored.lower_mtime_ns:
                stored.untouched = False  # somebody has written to it since
                return None
            return os.open(stored.lower or self.data_path(stored.info), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            log.warning("data file of %s cannot be opened: %s", stored.info.id.key, error.strerror)
            return None

    async def recover(self) -> None:
        """Free what a crash left behind: data files without a record. Runs beside serving."""
        try:
            orphans = await trio.to_thread.run_sync(self._orphans_sync)
        except (OSError, lmdb.Error) as error:
            log.error("cannot look for what a crash left in %s: %s", self.data_directory, error)
            return
        # What this process has opened since is not an orphan; no checkpoint until they are gone.
        orphans = [number for number in orphans if number not in self._objects]
        for number in orphans:
            self._unlink(number)
        if orphans:
            log.info("removed %d data files without a record", len(orphans))

    def _orphans_sync(self) -> list[int]:
        known = self._index.numbers()
        found = []
        with os.scandir(self.data_directory) as entries:
            for entry in entries:
                with contextlib.suppress(ValueError):
                    number = int(entry.name, 16)
                    if number not in known:
                        found.append(number)
        return found

    # -- listings -----------------------------------------------------------------------------------

    def listing(self, source: str) -> list[ObjectInfo] | None:
        """Return the last good listing of a source, or ``None``."""
        return self._look_up(lambda: self._index.listing(source))

    async def save_listing(self, source: str, objects: list[ObjectInfo]) -> None:
        """Keep a listing for a restarted worker."""
        async with self._commit_lock:
            await trio.to_thread.run_sync(self._index.save_listing, source, objects)

    def take_listings(self, directory: Path, sources: list[str]) -> None:
        """Copy saved listings from a cache that cannot be used otherwise, as far as they can be read."""
        try:
            with contextlib.closing(Index(directory / "index", readonly=True)) as other:
                for source in sources:
                    objects = other.listing(source)
                    if objects:
                        self._index.save_listing(source, objects)
        except (OSError, CacheError, lmdb.Error) as error:
            log.warning("the listings in %s cannot be read: %s", directory, error)

    # -- traces -------------------------------------------------------------------------------------

    def trace(self, name: str) -> bytes | None:
        """Return the text kept under ``name``, or ``None``."""
        return self._look_up(lambda: self._index.trace(name))

    async def save_trace(self, name: str, text: bytes) -> None:
        """Keep the order of a load for the next one."""
        async with self._commit_lock:
            await trio.to_thread.run_sync(self._index.save_trace, name, text)


def _piece_mask(chunk: ByteRange, part: ByteRange) -> int:
    first = (part.start - chunk.start) // PIECE_BYTES
    last = (part.stop - 1 - chunk.start) // PIECE_BYTES
    return ((1 << (last - first + 1)) - 1) << first
