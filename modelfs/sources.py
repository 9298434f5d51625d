"""The sources of a mount: their origins, their listings, the tree that these make.

A source with a second place shows the files of both; what the first does not give is read from the second where they
are known to be equal; see ``origins.fallback``. Listings are kept in the store for a restarted worker. Owned by the
trio loop.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import lmdb
import trio

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.config import Config
from modelfs.digests import Digest, is_sums_name, parse_sums
from modelfs.errors import ModelfsError, ObjectNotFoundError, OriginError
from modelfs.layout import INLINE
from modelfs.metrics import Metrics
from modelfs.origins import Origin
from modelfs.origins.fallback import FallbackOrigin, Twins
from modelfs.origins.inline import InlineOrigin
from modelfs.source import Source, parse_source
from modelfs.store import Store
from modelfs.tree import Listing, Tree

if TYPE_CHECKING:
    from modelfs.origins.remote import Processes

log = logging.getLogger(__name__)

LISTINGS = 4
"""Listings at once: downloads keep their connections."""
MARKER = ".modelfs-push"
"""An object of this name lies in a directory whose files are being written; see ``push``."""
SUMS_LIMIT_BYTES = 4 * 1024 * 1024
_EXAMPLES = 3


class Sources:
    """What a configuration names.

    Args:
        config: Sources, filters, and how object stores are reached.
        metrics: Counters.
        processes: Do what concerns the object stores, or ``None`` for threads of ours.

    Raises:
        ConfigError: A place cannot be used as configured.
    """

    def __init__(self, config: Config, metrics: Metrics, processes: "Processes | None") -> None:
        self._config = config
        self._metrics = metrics
        self._processes = processes
        self._origins: dict[str, Origin] = {}
        self._fallbacks: dict[str, FallbackOrigin] = {}
        self._sums: dict[int, dict[str, str]] = {}
        self._last: dict[Source, Listing] = {}
        self._listed: dict[tuple[Source, str], list[ObjectInfo]] = {}
        for place in sorted({source.place for source in config.sources}):
            self.origin(place)
        count = lambda result: metrics.fallback_runs.labels(result=result).inc()  # noqa: E731
        for source in config.sources:
            if source.origin:
                first = self.origin(source.place)
                self._fallbacks.setdefault(source.place, FallbackOrigin(first, count))
                self.origin(parse_source(source.origin).place)

    @property
    def by_name(self) -> Mapping[str, Origin]:
        """The origins by their names, those with a second place in front of others."""
        plain: dict[str, Origin] = {origin.name: origin for origin in self._origins.values()}
        plain[INLINE] = InlineOrigin()
        return plain | {origin.name: origin for origin in self._fallbacks.values()}

    def origin(self, place: str) -> Origin:
        """Return the origin of a place, made the first time.

        Raises:
            ConfigError: It cannot be used as configured.
        """
        if place not in self._origins:
            self._origins[place] = self._make_origin(place)
        return self._origins[place]

    def _make_origin(self, place: str) -> Origin:
        config, count = self._config.origin, self._metrics.origin_counter(parse_source(place).scheme)
        if self._processes is None:
            from modelfs.origins.places import make_origin  # noqa: PLC0415 - not needed with processes

            return make_origin(place, config, count)
        from modelfs.origins.remote import RemoteOrigin  # noqa: PLC0415 - needed with processes alone

        return RemoteOrigin(place=place, config=config, count=count, processes=self._processes)

    # -- listings -----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return under which names the listings are saved."""
        return [self._saved_name(source) for source in self._config.sources]

    def _saved_name(self, source: Source) -> str:
        pinned = "?versions" if self._config.origin.pin_versions else ""
        return f"{self._origins[source.place].name} {source.uri} {source.origin}{pinned}"

    def saved(self, store: Store) -> list[Listing]:
        """Return the last good listing of every source, or nothing."""
        saved = [(source, store.listing(self._saved_name(source))) for source in self._config.sources]
        if any(objects is None for _, objects in saved):
            return []
        return [self._listing(source, objects or []) for source, objects in saved]

    def _listing(self, source: Source, objects: list[ObjectInfo]) -> Listing:
        prefixes = [(self._origins[source.place].name, source.prefix)]
        if source.origin:
            second = parse_source(source.origin)
            prefixes.append((self.origin(second.place).name, second.prefix))
        return Listing(source.name, tuple(prefixes), tuple(objects), source.include, source.exclude, source.revision)

    async def refresh(self, store: Store | None = None) -> list[Listing]:
        """List every source anew, and keep the listings in ``store``.

        Raises:
            OriginError: A listing failed, or nothing is there.
        """
        listings: list[Listing | None] = [None] * len(self._config.sources)
        failures: list[OriginError] = []
        limiter = trio.CapacityLimiter(LISTINGS)

        async def list_one(position: int, source: Source) -> None:
            try:
                listings[position] = await self._list_one(source, store, limiter)
            except OriginError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for position, source in enumerate(self._config.sources):
                nursery.start_soon(list_one, position, source)
        if failures:
            self._metrics.tree_refreshes.labels(result="failed").inc()
            raise failures[0]
        self._metrics.tree_refreshes.labels(result="ok").inc()
        return [listing for listing in listings if listing is not None]

    async def _list_one(self, source: Source, store: Store | None, limiter: trio.CapacityLimiter) -> Listing:
        try:
            objects = await trio.to_thread.run_sync(self._list_sync, source, limiter=limiter)
        except ModelfsError:
            raise
        except Exception as error:
            # Servers answer what nobody foresees; the exception's text may hold what is secret.
            raise OriginError(
                f"{source.uri} cannot be listed ({type(error).__name__})", "see what its server answers"
            ) from error
        if not objects:
            raise ObjectNotFoundError(f"there is no object under {source.uri}", "check the prefix")
        last = self._last.get(source)
        if last is not None and list(map(id, last.objects)) == list(map(id, objects)):
            return last
        if store is not None:
            try:
                await store.save_listing(self._saved_name(source), objects)
            except (OSError, lmdb.Error) as error:
                log.warning("the listing cannot be kept for a restart: %s", error)
        self._last[source] = self._listing(source, objects)
        return self._last[source]

    def _list_sync(self, source: Source) -> list[ObjectInfo]:
        """Return the objects of both places of a source; of those in both, the first's."""
        origin = self._origins[source.place]
        if not source.origin:
            return self._complete(source, "", list(origin.list(source.prefix)))
        second = parse_source(source.origin)
        behind = self.origin(second.place)
        ours, failure = self._objects(origin, source, "", source.prefix)
        theirs, other_failure = self._objects(behind, source, source.origin, second.prefix)
        if failure is not None and not (ours or theirs):
            raise failure
        if failure is not None or other_failure is not None:
            log.warning("%s has one place only now: %s", source.uri, failure or other_failure)
        known = {info.id.key.removeprefix(source.prefix): info for info in ours}
        published = self._published(origin, ours, failed=failure is not None)
        shown, equal = list(ours), dict[int, ObjectInfo]()
        for other in theirs:
            relative = other.id.key.removeprefix(second.prefix)
            info, digest = known.get(relative), published.get(source.prefix + relative)
            same = self._same(digest, behind, other)
            if same is False:
                log.error("%s of %s does not match %s: not used", relative, source.origin, digest and digest.source)
                self._metrics.fallback_runs.labels(result="refused").inc()
            elif info is None:
                shown.append(other)
            elif same and info.size == other.size:
                equal[info.number] = other
        self._fallbacks[source.place].pair(source.uri, Twins(behind, equal))
        return shown

    def _objects(
        self, origin: Origin, source: Source, place: str, prefix: str
    ) -> tuple[list[ObjectInfo], OriginError | None]:
        """Return what lies in one of two places; where that is not known now, what lay there last, and why.

        Raises:
            OriginError: Something is wrong that does not pass.
        """
        try:
            return self._complete(source, place, list(origin.list(prefix))), None
        except OriginError as error:
            if isinstance(error, ObjectNotFoundError):
                return [], error
            if not error.retryable:
                raise
            return self._listed.get((source, place), []), error

    def _complete(self, source: Source, place: str, objects: list[ObjectInfo]) -> list[ObjectInfo]:
        """Leave out what is being written; what was complete there before stays in its place.

        Raises:
            ObjectNotFoundError: Everything is being written.
        """
        marked = tuple(info.id.key[: -len(MARKER)] for info in objects if info.id.key.rpartition("/")[2] == MARKER)
        if marked:
            before = [info for info in self._listed.get((source, place), []) if info.id.key.startswith(marked)]
            kept = [info for info in objects if not info.id.key.startswith(marked)]
            log.warning("%s: what is being written is not shown (%d files)", source.uri, len(objects) - len(kept))
            objects = kept + before
            if not objects:
                raise ObjectNotFoundError(f"{source.uri} is being written", "wait for modelfs push, or run it again")
        known = self._listed.get((source, place), [])
        if list(map(_all_of, known)) == list(map(_all_of, objects)):
            return known  # the same objects, and not a second copy of each
        self._listed[source, place] = objects
        return objects

    def _same(self, digest: Digest | None, origin: Origin, info: ObjectInfo) -> bool | None:
        """Return whether an object has this digest; ``None`` where that is not known."""
        theirs = origin.digest(info) if digest is not None else None
        if digest is None or theirs is None or theirs.algorithm != digest.algorithm:
            return None
        return theirs.value == digest.value

    def _published(self, origin: Origin, objects: list[ObjectInfo], *, failed: bool) -> dict[str, Digest]:
        """Return the digests in the lists of sums among ``objects``, by key; a list is read once per version."""
        found: dict[str, Digest] = {}
        for info in objects:
            directory, slash, name = info.id.key.rpartition("/")
            if is_sums_name(name) and info.size <= SUMS_LIMIT_BYTES:
                if info.number not in self._sums and failed:
                    continue  # it cannot be read now
                if info.number not in self._sums:
                    sink = _Text(info.size)
                    if info.size:
                        origin.read_into(info, ByteRange(0, info.size), sink)  # of this version, or not at all
                    self._sums[info.number] = parse_sums(sink.data.decode("utf-8", "replace"))
                for relative, value in self._sums[info.number].items():
                    found[f"{directory}{slash}{relative}"] = Digest("sha256", value, info.id.key)
        return found

    # -- the tree -----------------------------------------------------------------------------------

    def tree(self, listings: list[Listing]) -> Tree:
        """Return what the listings make, and say what cannot be shown."""
        tree = Tree(listings, self._config.tree)
        self._metrics.tree_files.set(tree.file_count)
        for reason, count in tree.skipped.items():
            self._metrics.tree_skipped.labels(reason=reason).set(count)
        odd = {reason: key for reason, key in tree.skipped_examples.items() if reason != "filtered"}
        if odd:
            shown = "; ".join(f"{reason}: {key[:80]!r}" for reason, key in list(odd.items())[:_EXAMPLES])
            total = sum(count for reason, count in tree.skipped.items() if reason in odd)
            log.warning("%d keys cannot be shown as files (%s)", total, shown)
        return tree


class _Text:
    """A sink that keeps a small file."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._filled = 0

    def space(self) -> memoryview:
        return memoryview(self.data)[self._filled :]

    def advance(self, count: int) -> None:
        self._filled += count

    def connected(self, abort: object) -> None:
        pass


def _all_of(info: ObjectInfo) -> tuple[ObjectInfo, str]:
    """Return what two listings are compared by: also where a version is found."""
    return info, info.locator
