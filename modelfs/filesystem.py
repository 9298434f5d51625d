"""What the kernel sees: the namespace for pyfuse3 and the data path for the front.

Thin: names and attributes come from the tree, bytes from the store or the fetch engine. The only place
where a domain error becomes an errno; any other exception is logged and answered EIO, for one that left
a pyfuse3 handler would end the mount. Runs on the trio loop; reads of resident bytes run in ``_disk``
threads, which also send the reply.
"""

import contextlib
import errno
import functools
import itertools
import logging
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import pyfuse3
import trio

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectInfo, chunks_of, split
from modelfs.config import TreeConfig
from modelfs.errors import IntegrityError, ModelfsError, ObjectChangedError
from modelfs.fetch import Fetch
from modelfs.fuse.front import OWN_XATTR_PREFIX, Reply
from modelfs.loads import Load, Loads
from modelfs.logs import Seldom
from modelfs.metrics import Metrics
from modelfs.prefetch import Prefetch
from modelfs.store import Chunk, CorruptChunkError, Store, StoredObject
from modelfs.tree import Directory, File, Node, Tree
from modelfs.verification import Verification, state_of

log = logging.getLogger(__name__)

DISK_THREADS = 4
FOREVER_SECONDS = 86400.0
"""Attributes never change: a changed object is another inode."""
BLOCK_BYTES = 4096
"""st_blksize; llama.cpp takes it for the alignment of O_DIRECT."""
XATTRS = (b"etag", b"uri", b"resident_bytes", b"digest")
_WARN_SECONDS = 5.0

_Handler = TypeVar("_Handler", bound=Callable[..., Coroutine[Any, Any, Any]])


def _answers_errno(handler: _Handler) -> _Handler:
    """Turn whatever leaves a handler into an errno for the kernel."""

    @functools.wraps(handler)
    async def wrapped(self: "Namespace", *args: object) -> object:
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except ModelfsError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except Exception:
            log.exception("unexpected failure in %s", handler.__name__)
            self.metrics.fuse_errors.labels(op=handler.__name__, errno="EIO").inc()
            raise pyfuse3.FUSEError(errno.EIO) from None

    return cast("_Handler", wrapped)


class View:
    """The current tree and the files that are open; shared by namespace and data path.

    Args:
        store: Resolves files that are open but no longer listed.
        tree: The first tree.
    """

    def __init__(self, store: Store, tree: Tree) -> None:
        self._store = store
        self.tree = tree
        self.open: dict[int, StoredObject] = {}

    def node(self, inode: int) -> Node | None:
        """Return the listed node of ``inode``, or ``None``."""
        return self.tree.nodes.get(inode)

    def info(self, inode: int) -> ObjectInfo | None:
        """Return the object behind a file's inode: listed, open, or known to the index."""
        node = self.node(inode)
        if isinstance(node, File):
            return node.info
        stored = self.open.get(inode)
        return stored.info if stored else None


class Namespace(pyfuse3.Operations):
    """Names, attributes and directories.

    Args:
        view: The current tree.
        config: Owner, permissions, refresh interval.
        store: For statfs and resident bytes.
        prefetch: Told about the first touch of a directory.
        metrics: Counters.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, *, view: View, config: TreeConfig, store: Store, prefetch: Prefetch, metrics: Metrics) -> None:
        super().__init__()
        self._view = view
        self._store = store
        self._prefetch = prefetch
        self.metrics = metrics
        self._uid = config.uid if config.uid >= 0 else os.geteuid()
        self._gid = config.gid if config.gid >= 0 else os.getegid()
        self._permissions = 0o555 & ~config.umask
        fresh = config.refresh and not config.immutable
        self._entry_seconds = min(config.refresh, FOREVER_SECONDS) if fresh else FOREVER_SECONDS
        self._listings: dict[int, list[Node]] = {}
        self._missing = pyfuse3.EntryAttributes()
        self._missing.st_ino = 0
        self._missing.entry_timeout = self._entry_seconds
        # Handles must not repeat after a restart: a stale one must miss, not meet another directory.
        self._handles = itertools.count(random.getrandbits(60))

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        node = self._view.node(inode)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.generation = 0
        entry.entry_timeout = self._entry_seconds
        entry.attr_timeout = FOREVER_SECONDS
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_blksize = BLOCK_BYTES
        if isinstance(node, Directory):
            entry.st_mode = stat.S_IFDIR | self._permissions
            entry.st_nlink = 2
            mtime_ns = node.mtime_ns
            entry.attr_timeout = self._entry_seconds
        else:
            info = self._view.info(inode)
            if info is None:
                raise pyfuse3.FUSEError(errno.ESTALE)
            entry.st_mode = stat.S_IFREG | (self._permissions & 0o444)
            entry.st_nlink = 1
            entry.st_size = info.size
            entry.st_blocks = -(-info.size // 512)
            mtime_ns = info.mtime_ns
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = mtime_ns
        return entry

    def _directory(self, inode: int) -> Directory:
        node = self._view.node(inode)
        if isinstance(node, Directory):
            return node
        raise pyfuse3.FUSEError(errno.ESTALE if node is None else errno.ENOTDIR)

    @_answers_errno
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Find a name; a missing one is remembered by the kernel."""
        parent = self._directory(parent_inode)
        self._prefetch.touch(parent)
        node = parent.entries.get(os.fsdecode(name))
        return self._attributes(node.inode) if node else self._missing

    @_answers_errno
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return attributes."""
        return self._attributes(inode)

    @_answers_errno
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Take a snapshot: one listing of a directory never mixes two trees."""
        directory = self._directory(inode)
        self._prefetch.touch(directory)
        handle = next(self._handles)
        self._listings[handle] = list(directory.entries.values())
        return handle

    @_answers_errno
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Give entries in natural order from position ``start_id``."""
        entries = self._listings.get(fh)
        if entries is None:
            raise pyfuse3.FUSEError(errno.ESTALE)  # opened through a worker before this one
        for position in range(start_id, len(entries)):
            node = entries[position]
            try:
                attributes = self._attributes(node.inode)
            except pyfuse3.FUSEError:
                continue  # gone with a refresh since the snapshot
            if not pyfuse3.readdir_reply(token, os.fsencode(node.name), attributes, position + 1):
                return

    @_answers_errno
    async def releasedir(self, fh: int) -> None:
        """Drop the snapshot."""
        self._listings.pop(fh, None)

    @_answers_errno
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the models' total size; nothing is free, for nothing can be written."""
        tree = self._view.tree
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = -(-tree.total_bytes // BLOCK_BYTES)
        data.f_bfree = data.f_bavail = 0
        data.f_files = len(tree.nodes)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    @_answers_errno
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return one of our attributes."""
        info = self._view.info(inode)
        word = name.removeprefix(OWN_XATTR_PREFIX)
        if info is None or word not in XATTRS or word == name:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        if word == b"etag":
            return info.id.version.encode() if "?" in info.id.version else info.id.version.strip('"').encode()
        if word == b"uri":
            bucket = info.id.origin.partition("@")[0]
            return f"{bucket}/{info.id.key}".encode("utf-8", "surrogateescape")
        stored = self._store.object(info)
        return (state_of(stored) if word == b"digest" else str(stored.resident_bytes)).encode()

    @_answers_errno
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Name our attributes."""
        return [OWN_XATTR_PREFIX + word for word in XATTRS] if self._view.info(inode) else []


class DataPath:
    """Open, read and release; the front's ``Handler``.

    Args:
        view: The current tree and the open files.
        store: Resident bytes.
        fetch: Bytes on their way.
        prefetch: Told about opens.
        verification: Told about opens; says which files may be read.
        loads: Told what readers do and wait for.
        metrics: Counters.
    """

    def __init__(
        self,
        *,
        view: View,
        store: Store,
        fetch: Fetch,
        prefetch: Prefetch,
        verification: Verification,
        loads: Loads,
        metrics: Metrics,
    ) -> None:
        self._view = view
        self._loads = loads
        self._store = store
        self._fetch = fetch
        self._prefetch = prefetch
        self._verification = verification
        self._metrics = metrics
        self._disk = ThreadPoolExecutor(DISK_THREADS, "modelfs-disk")
        self._buffers = threading.local()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._seldom = Seldom(_WARN_SECONDS)
        self._tier_bytes = {tier: metrics.read_bytes.labels(tier=tier) for tier in ("memory", "store", "origin")}
        self._tier_reads = {tier: metrics.reads.labels(tier=tier) for tier in ("memory", "store", "origin")}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the waiting reads until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._disk.shutdown(wait=False, cancel_futures=True)

    # -- opens --------------------------------------------------------------------------------------

    def open(self, inode: int, *, direct: bool) -> bool:
        """See ``Handler.open``."""
        stored = self._find(inode)
        keep = self._verification.opened(stored)
        self._hold(inode, stored)
        if direct:
            self._prefetch.skip_pages()
        return keep

    def reopen(self, inode: int) -> None:
        """See ``Handler.reopen``."""
        self._hold(inode, self._find(inode))

    def _find(self, inode: int) -> StoredObject:
        info = self._view.info(inode) or self._store.known_object(inode)
        if info is None:
            raise ObjectChangedError(f"inode {inode} is no longer in the listing", "open the path again")
        return self._store.object(info)

    def _hold(self, inode: int, stored: StoredObject) -> None:
        if inode in self._view.open:
            return
        self._store.acquire(stored)
        self._store.touch(stored, range(0))
        self._view.open[inode] = stored
        node = self._view.node(inode)
        if isinstance(node, File):
            self._prefetch.touch(node.parent)

    def backing(self, inode: int) -> int | None:
        """See ``Handler.backing``."""
        stored = self._view.open[inode]
        return None if self._verification.withholds(stored) else self._store.backing_descriptor(stored)

    def opened(self, inode: int, mode: str) -> None:
        """See ``Handler.opened``."""
        stored = self._view.open[inode]
        stored.passed = mode == "passthrough"
        stored.copied = not stored.passed
        if stored.passed:
            self._store.touch(stored, range(0))
        node = self._view.node(inode)
        if isinstance(node, File):
            self._loads.opened(node, mode)

    def released(self, inode: int) -> None:
        """See ``Handler.released``."""
        stored = self._view.open.pop(inode, None)
        if stored is not None:
            stored.passed = stored.copied = False
            self._fetch.drop_ahead(stored)
            self._store.release(stored)

    # -- reads --------------------------------------------------------------------------------------

    def read(self, inode: int, offset: int, length: int, reply: Reply) -> None:
        """See ``Handler.read``: resident bytes go to a disk thread, others get a waiting task."""
        stored = self._view.open.get(inode)
        if stored is None:
            reply.error(errno.ESTALE)
            return
        if self._verification.refuses(stored):
            reply.error(IntegrityError.errno)
            return
        span = stored.info.clip(offset, length)
        if not len(span):
            reply.data([])
            return
        indices = chunks_of(span)
        self._store.touch(stored, indices)
        load = self._loads.read(stored.info, span)
        if not stored.complete:
            self._fetch.note_read(stored, span)
        held = [self._fetch.peek(stored, index, part) for index, part in split(span)]
        views = [view for view in held if view is not None]
        if len(views) == len(held):
            reply.data(views)
            self._count("memory", span, load)
        elif not stored.missing(span):
            self._read_from_store(stored, span, reply, load)
        else:
            assert self._nursery is not None
            self._nursery.start_soon(self._read_waiting, stored, span, reply, load)

    def _read_from_store(self, stored: StoredObject, span: ByteRange, reply: Reply, load: Load | None) -> None:
        """Pin and hand over to a disk thread; no checkpoint since residency was checked."""
        pinned = self._store.pin(stored, span)
        if load is not None:
            load.begin("store", time.monotonic())
        try:
            descriptor = self._store.descriptor(stored)
        except OSError as error:
            self._settle(stored, span, reply, load, pinned, error)
            return
        self._disk.submit(self._read_job, stored, descriptor, span, reply, load, pinned)

    def _read_job(
        self,
        stored: StoredObject,
        descriptor: int,
        span: ByteRange,
        reply: Reply,
        load: Load | None,
        pinned: list[Chunk],
    ) -> None:
        """Read, check and answer; in a disk thread."""
        failure: Exception | None = None
        try:
            target = self._buffer(len(span))
            self._store.read_sync(stored, descriptor, pinned, span, target)
            reply.data([target])
            if span.stop % CHUNK_BYTES == 0 or span.stop == stored.info.size:
                # The reader's own pages hold these bytes now; ours would be the second copy.
                last = stored.info.chunk_range(chunks_of(span)[-1])
                os.posix_fadvise(descriptor, last.start, len(last), os.POSIX_FADV_DONTNEED)
        except (CorruptChunkError, OSError) as error:
            failure = error
        except Exception as error:
            log.exception("unexpected failure while reading %s", stored.info.id.key)
            failure = error
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):  # the process is ending; the kernel asks again
            self._token.run_sync_soon(self._settle, stored, span, reply, load, pinned, failure)

    def _buffer(self, size: int) -> memoryview:
        """Return this thread's reused buffer."""
        buffer: bytearray | None = getattr(self._buffers, "data", None)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers.data = bytearray(max(size, 1024 * 1024))
        return memoryview(buffer)[:size]

    def _settle(
        self,
        stored: StoredObject,
        span: ByteRange,
        reply: Reply,
        load: Load | None,
        pinned: list[Chunk],
        failure: Exception | None,
    ) -> None:
        """Finish a read from the store on the loop; a failed one is fetched instead."""
        self._store.unpin(stored, pinned)
        if load is not None:
            load.end("store", time.monotonic())
        if failure is None:
            self._count("store", span, load)
        elif reply.done:
            log.warning("a reply to the kernel failed: %s", failure)
        else:
            assert self._nursery is not None
            self._nursery.start_soon(self._replace_damaged, stored, span, reply, load, failure)

    async def _replace_damaged(
        self, stored: StoredObject, span: ByteRange, reply: Reply, load: Load | None, failure: Exception
    ) -> None:
        for index in chunks_of(span):
            await self._store.discard(stored, index, str(failure))
        await self._read_waiting(stored, span, reply, load)

    async def _read_waiting(self, stored: StoredObject, span: ByteRange, reply: Reply, load: Load | None) -> None:
        """Answer a read some of whose bytes are not in the store yet."""
        began = time.monotonic()
        if load is not None:
            load.begin("origin", began)
        try:
            await self._gather(stored, span, reply, load)
        except ModelfsError as error:
            self._warn(error)
            reply.error(error.errno)
        except Exception:
            log.exception("unexpected failure while reading %s", stored.info.id.key)
            if not reply.done:
                reply.error(errno.EIO)
        finally:
            now = time.monotonic()
            if load is not None:
                load.end("origin", now)
            self._metrics.read_wait.observe(now - began)

    async def _gather(self, stored: StoredObject, span: ByteRange, reply: Reply, load: Load | None) -> None:
        """Collect the parts chunk by chunk and answer from memory, or from the store if all is there by then."""
        parts: list[bytes | memoryview] = []
        pieces = split(span)
        waited = False
        for index, part in pieces:
            waited = waited or self._fetch.peek(stored, index, part) is None
            view = await self._fetch.obtain(stored, index, part)
            if view is None and len(pieces) == 1:
                self._read_from_store(stored, span, reply, load)
                return
            if view is None:
                view = await self._part_from_store(stored, part)
                if view is None:  # evicted or damaged between two checkpoints: begin again
                    await self._gather(stored, span, reply, load)
                    return
            # The engine's view is good until the next checkpoint; only a single part needs no copy.
            parts.append(view if len(pieces) == 1 else bytes(view))
        reply.data(parts)
        self._count("origin" if waited else "memory", span, load)

    async def _part_from_store(self, stored: StoredObject, part: ByteRange) -> memoryview | None:
        if stored.missing(part):
            return None
        pinned = self._store.pin(stored, part)
        target = memoryview(bytearray(len(part)))
        try:
            descriptor = self._store.descriptor(stored)
            await trio.to_thread.run_sync(self._store.read_sync, stored, descriptor, pinned, part, target)
        except (CorruptChunkError, OSError) as error:
            failure = error
        else:
            return target
        finally:
            self._store.unpin(stored, pinned)
        await self._store.discard(stored, chunks_of(part).start, str(failure))
        return None

    def _count(self, tier: str, span: ByteRange, load: Load | None) -> None:
        if load is not None:
            load.read_bytes[tier] += len(span)
        self._tier_bytes[tier].inc(len(span))
        self._tier_reads[tier].inc()

    def _warn(self, error: ModelfsError) -> None:
        if self._seldom(type(error).__name__):
            log.warning("a read failed: %s", error)
