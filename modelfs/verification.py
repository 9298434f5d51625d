"""Files are hashed and compared with what their publisher says of them: unverified → verified, bad or unknown.

Which digest counts: a ``NAME.sha256`` beside the file; a ``SHA256SUMS`` in its directory or one above; what
``hf download`` keeps of the Hub's; then what the store says of the whole object. Only complete files are hashed,
from the local store: nothing is downloaded for it but the small files that hold digests. A file that does not
match is dropped and fetched once more; if that does not match either, it is bad.

Modes: ``off``; ``background``, when nothing is being read or downloaded; ``strict``, at once: a complete file is
not handed to the kernel before it is verified, and a bad one is refused. Owned by the trio loop; one file at a time.
"""

import functools
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectInfo
from modelfs.digests import (
    ALGORITHMS,
    BAD,
    ETAG,
    UNKNOWN,
    VERIFIED,
    Digest,
    Hasher,
    Verdict,
    is_sums_name,
    parse_hub_metadata,
    parse_sums,
)
from modelfs.errors import IntegrityError, ModelfsError, ReadTimeoutError
from modelfs.fetch import Fetch, PlanItem
from modelfs.metrics import Metrics
from modelfs.prefetch import RANK_WEIGHTS, read_whole
from modelfs.store import CorruptChunkError, Store, StoredObject
from modelfs.threads import in_background
from modelfs.tree import Directory, File, Tree

log = logging.getLogger(__name__)

SUMS_LIMIT_BYTES = 4 * 1024 * 1024
"""A list of digests beyond this is not read."""
AGAIN_SECONDS = 60.0
"""After a digest could not be had, as while the store is away."""
HUB_DIRECTORY = ".cache/huggingface/download"
PAUSE_SECONDS = 1.0
DETAILS = 1000
"""Most files named in one report; the counts cover all."""
_LISTS_KEPT = 64
_BATCH = 64
"""Files looked at before the loop gets a turn."""


@dataclass(slots=True)
class _Wanted:
    """A file to be hashed: at once if it is ``asked`` for, else when it is quiet.

    ``anew``: also if it has been judged by the same digest. ``not_before`` is in monotonic seconds.
    """

    stored: StoredObject
    asked: bool
    anew: bool = False
    hashed: int = 0
    not_before: float = 0.0


class Verification:
    """Hashes files and remembers what came of it.

    Args:
        mode: ``off``, ``background`` or ``strict``.
        store: Where the files are.
        fetch: Fetches bad files once more, and the files that hold digests.
        ask_store: Asks the object store for an object's digest.
        tree: Returns the current tree.
        quiet: Whether nothing is being read or downloaded, so that hashing is in nobody's way.
        restarted: A worker before this one may have dropped bad files whose pages the kernel still has.
        metrics: Counters.
    """

    def __init__(
        self,
        *,
        mode: str,
        store: Store,
        fetch: Fetch,
        ask_store: Callable[[ObjectInfo], Awaitable[Digest | None]],
        tree: Callable[[], Tree],
        quiet: Callable[[], bool],
        restarted: bool,
        metrics: Metrics,
    ) -> None:
        self._mode = mode
        self._store = store
        self._fetch = fetch
        self._ask_store = ask_store
        self._tree = tree
        self._quiet = quiet
        self._restarted = restarted
        self._metrics = metrics
        self._wanted: dict[int, _Wanted] = {}
        self._current: _Wanted | None = None
        self._refetched: set[int] = set()
        self._awaited: set[int] = set()
        self._damaged: set[int] = set()
        self._stale: set[int] = set()
        self._opened: set[int] = set()
        self._unseen = False
        self._etags_doubtful = False
        self._lists: dict[int, dict[str, str]] = {}
        self._work = trio.Event()
        store.on_complete.append(self._want_by_itself)

    # -- what others ask ----------------------------------------------------------------------------

    def opened(self, stored: StoredObject) -> bool:
        """Note that a file is opened; return whether the kernel may keep what it has of it in the page cache.

        Raises:
            IntegrityError: It is bad, and bad files are refused.
        """
        if self.refuses(stored):
            raise self._refusal(stored)
        self._want_by_itself(stored)
        number = stored.info.number
        keep = number not in self._stale and (number in self._opened or not self._restarted)
        self._stale.discard(number)
        self._opened.add(number)
        return keep

    def refuses(self, stored: StoredObject) -> bool:
        """Return whether reads of a file are to fail."""
        return self._mode == "strict" and stored.verdict is not None and stored.verdict.state == BAD

    def withholds(self, stored: StoredObject) -> bool:
        """Return whether the kernel must not read a file without us yet."""
        return self._mode == "strict" and stored.verdict is None

    def check(self, path: str, *, anew: bool = True) -> None:
        """Hash every complete file under ``path`` soon; with ``anew`` also what has been judged already."""
        for file in self._tree().under(path):
            stored = self._store.object(file.info)
            state = stored.verdict.state if stored.verdict is not None and stored.sound else ""
            if stored.complete and (anew or state != VERIFIED):
                self._refetched.discard(file.info.number)
                self._damaged.discard(file.info.number)
                # Where no digest was known there may be one now; without, nothing is hashed.
                self._want(stored, asked=True, anew=anew or state != UNKNOWN)

    def look_again(self) -> None:
        """Look through all files when it is quiet: digests may have been added or mended."""
        self._unseen = self._mode != "off"
        self._work.set()

    def report(self, path: str) -> dict[str, Any]:
        """Return how it stands with the files under ``path``.

        ``counts`` by state (``pending``: to be hashed), how many are ``awaited`` because they are being fetched once
        more, ``hashed`` of ``size`` bytes, all ``resident`` ones, and ``details`` of files that are not verified.
        """
        now = time.monotonic()
        pending = {number: 0 for number, wanted in self._wanted.items() if wanted.not_before <= now}
        if self._current is not None:
            pending[self._current.stored.info.number] = self._current.hashed
        counts = dict.fromkeys((VERIFIED, BAD, UNKNOWN, "pending", "unverified", "partial"), 0)
        size = hashed = awaited = resident = 0
        details: list[dict[str, Any]] = []
        for file in self._tree().under(path):
            stored = self._store.object(file.info)
            state = "pending" if file.inode in pending else state_of(stored)
            counts[state] += 1
            awaited += file.inode in self._awaited
            resident += stored.resident_bytes
            if state != "partial":
                size += file.info.size
                hashed += pending.get(file.inode, file.info.size)
            if state != VERIFIED and len(details) < DETAILS:
                digest = stored.verdict.digest if stored.verdict else None
                details.append({"path": file.path, "state": state, "source": digest.source if digest else ""})
        return {
            "counts": counts,
            "awaited": awaited,
            "size": size,
            "hashed": hashed,
            "resident": resident,
            "details": details,
        }

    def _want_by_itself(self, stored: StoredObject) -> None:
        awaited = stored.info.number in self._awaited
        hashes = awaited or (self._mode != "off" and stored.info.number not in self._damaged)
        if hashes and stored.complete and stored.verdict is None:
            self._want(stored, asked=awaited or self._mode == "strict")

    def _want(self, stored: StoredObject, *, asked: bool, anew: bool = False) -> None:
        wanted = self._wanted.setdefault(stored.info.number, _Wanted(stored, asked))
        wanted.asked, wanted.anew = wanted.asked or asked, wanted.anew or anew
        wanted.not_before = 0.0 if asked else wanted.not_before
        self._work.set()

    # -- hashing ------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hash what is wanted until cancelled."""
        task_status.started()
        self.look_again()
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._wanted or self._unseen:
                quiet = self._quiet()
                ready = self._next(quiet=quiet)
                if ready is None:
                    if quiet and self._unseen:
                        await self._look_through()
                    with trio.move_on_after(PAUSE_SECONDS):
                        await self._work.wait()
                    self._work = trio.Event()
                    continue
                self._current = self._wanted.pop(ready.stored.info.number)
                self._awaited.discard(ready.stored.info.number)
                try:
                    await self._verify(ready)
                except ModelfsError as error:
                    log.warning("%s is not verified: %s", ready.stored.info.id.key, error)
                    if ready.anew:
                        ready.stored.verdict = None  # it was asked for, and there is no answer
                    if self._mode != "off" and (error.retryable or isinstance(error, ReadTimeoutError)):
                        again_at = time.monotonic() + AGAIN_SECONDS
                        later = _Wanted(ready.stored, asked=False, anew=ready.anew, not_before=again_at)
                        self._wanted.setdefault(ready.stored.info.number, later)
                except Exception:
                    log.exception("unexpected failure while verifying %s", ready.stored.info.id.key)
                finally:
                    self._current = None

    def _next(self, *, quiet: bool) -> _Wanted | None:
        """Return what to hash now; first what has been fetched once more: it tells how far digests can be believed."""
        now = time.monotonic()
        awaited = (self._wanted[number] for number in self._awaited if number in self._wanted)
        every = itertools.chain(awaited, self._wanted.values())
        return next((wanted for wanted in every if wanted.not_before <= now and (wanted.asked or quiet)), None)

    async def _look_through(self) -> None:
        self._unseen = False
        for count, file in enumerate(list(self._tree().root.walk())):
            if count % _BATCH == 0:
                await trio.sleep(0)
            stored = self._store.object(file.info)
            if stored.complete and (stored.verdict is None or stored.verdict.state != VERIFIED):
                self._want(stored, asked=False)

    async def _verify(self, wanted: _Wanted) -> None:
        stored = wanted.stored
        changes = stored.changes
        digest = await self._digest(stored.info)
        if stored.verdict is not None and stored.verdict.digest == digest and not wanted.anew:
            return  # it has been judged by just this
        if digest is None and stored.untouched:
            await self._settle(stored, Verdict(UNKNOWN), changes)
            return
        with self._store.using(stored):
            value = await self._hash(wanted, ALGORITHMS[digest.algorithm if digest else "crc32"]())
        if value is None:
            return  # evicted or damaged meanwhile
        if digest is None:  # but its own checksums have all been looked at
            await self._settle(stored, Verdict(UNKNOWN), changes)
            return
        if value == digest.value:
            self._refetched.discard(stored.info.number)
            await self._settle(stored, Verdict(VERIFIED, digest), changes)
            return
        key, number = stored.info.id.key, stored.info.number
        log.error("%s of %s is %s, but %s says %s", digest.algorithm, key, value, digest.source, digest.value)
        if digest.source == ETAG and self._etags_doubtful and self._mode != "strict":
            await self._settle(stored, Verdict(UNKNOWN, digest), changes)
            return
        self._stale.add(number)
        if number not in self._refetched and stored.info.size:
            self._refetched.add(number)
            self._metrics.verified_files.labels(result="refetched").inc()
            log.error("%s is dropped and fetched once more", key)
            await self._store.evict(stored, list(stored.chunks), "bad", force=True)
            self._fetch_again(stored, ByteRange(0, stored.info.size))
        else:
            # Either the store keeps it wrongly, or its ETags are no MD5s: then not every file is to be fetched twice.
            self._etags_doubtful = self._etags_doubtful or digest.source == ETAG
            fate = "reads of it fail" if self._mode == "strict" else "it is served; --verify strict would refuse it"
            log.error("%s is bad, also after it was fetched once more: %s", key, fate)
            await self._settle(stored, Verdict(BAD, digest), changes)

    async def _settle(self, stored: StoredObject, verdict: Verdict, changes: int) -> None:
        self._metrics.verified_files.labels(result=verdict.state).inc()
        self._damaged.discard(stored.info.number)
        await self._store.judge(stored, verdict, changes)

    async def _hash(self, wanted: _Wanted, hasher: Hasher) -> str | None:
        """Return the digest of the stored bytes, or ``None`` where some are gone or damaged (and dropped)."""
        stored, buffer = wanted.stored, memoryview(bytearray(min(CHUNK_BYTES, wanted.stored.info.size)))
        wanted.hashed = 0
        for index in range(stored.info.chunk_count):
            if index not in stored.chunks:
                return None
            span = stored.info.chunk_range(index)
            pinned = self._store.pin(stored, span)
            for chunk in pinned:
                chunk.verified = 0  # by what lies on the disk now, not by what was written
            try:
                descriptor = self._store.descriptor(stored)
                target = buffer[: len(span)]
                read = functools.partial(self._store.read_sync, stored, descriptor, pinned, span, target)
                await trio.to_thread.run_sync(in_background, read)
                await trio.to_thread.run_sync(in_background, functools.partial(hasher.update, target))
                if stored.copied:
                    # The reader's own pages hold what it has read; ours would be the second copy.
                    os.posix_fadvise(descriptor, span.start, len(span), os.POSIX_FADV_DONTNEED)
            except (CorruptChunkError, OSError) as error:
                failure = error
            else:
                wanted.hashed += len(span)
                continue
            finally:
                self._store.unpin(stored, pinned)
            await self._store.discard(stored, index, str(failure))
            if stored.info.number not in self._damaged:  # a disk that damages it again is left to its readers
                self._damaged.add(stored.info.number)
                self._fetch_again(stored, span)
            return None
        return hasher.hexdigest()

    def _fetch_again(self, stored: StoredObject, span: ByteRange) -> None:
        """Download what was dropped; the file is hashed when it is complete."""
        self._awaited.add(stored.info.number)
        self._fetch.submit([PlanItem(stored.info, span)], RANK_WEIGHTS)

    def _refusal(self, stored: StoredObject) -> IntegrityError:
        digest = stored.verdict.digest if stored.verdict else None
        source = digest.source if digest else "its digest"
        return IntegrityError(
            f"{stored.info.id.key} does not match {source}", "upload it again, or mend that and run modelfs verify"
        )

    # -- digests ------------------------------------------------------------------------------------

    async def _digest(self, info: ObjectInfo) -> Digest | None:
        """Return the digest that counts for an object.

        Raises:
            ModelfsError: It cannot be had now.
        """
        file = self._tree().nodes.get(info.number)
        if isinstance(file, File):
            published = await self._published(file)
            if published is not None:
                return published
        return await self._ask_store(info)

    async def _published(self, file: File) -> Digest | None:
        beside = file.parent.entries.get(f"{file.name}.sha256")
        if isinstance(beside, File):
            value = (await self._list(beside, file.name)).get(file.name)
            if value:
                return Digest("sha256", value, beside.path)
        relative, directory = file.name, file.parent
        while True:
            for sums in directory.files():
                if is_sums_name(sums.name) and sums is not file:
                    value = (await self._list(sums)).get(relative)
                    if value:
                        return Digest("sha256", value, sums.path)
            value = await self._hub_digest(directory, relative)
            if value:
                return Digest("sha256", value, "the Hub")
            if directory.parent is None:
                return None
            relative, directory = f"{directory.name}/{relative}", directory.parent

    async def _list(self, sums: File, default: str = "") -> dict[str, str]:
        found = self._lists.get(sums.inode)
        if found is None:
            if len(self._lists) >= _LISTS_KEPT:
                self._lists.clear()
            text = await self._text(sums)
            found = await trio.to_thread.run_sync(in_background, functools.partial(parse_sums, text, default))
            self._lists[sums.inode] = found
        return found

    async def _hub_digest(self, directory: Directory, relative: str) -> str | None:
        node: Directory | File | None = directory
        for part in f"{HUB_DIRECTORY}/{relative}.metadata".split("/"):
            node = node.entries.get(part) if isinstance(node, Directory) else None
        return parse_hub_metadata(await self._text(node)) if isinstance(node, File) else None

    async def _text(self, file: File) -> str:
        if not 0 < file.info.size <= SUMS_LIMIT_BYTES:
            return ""
        return (await read_whole(self._store, self._fetch, file.info)).decode("utf-8", "replace")


def state_of(stored: StoredObject) -> str:
    """Return the word for what is known of a file's bytes."""
    if not stored.complete:
        return "partial"
    return stored.verdict.state if stored.verdict else "unverified"
