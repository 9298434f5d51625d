"""Where traces are kept: in the index of this node, and in the bucket for the next one.

The bucket is asked only where ``--trace-uri`` names a place; a failure there costs the trace, never the load.
"""

import logging
from collections.abc import Sequence

import lmdb
import trio

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.errors import OriginError
from modelfs.origins import Origin
from modelfs.store import Store
from modelfs.trace import MAX_TEXT_BYTES, Trace, model_name

log = logging.getLogger(__name__)

BUCKET_SECONDS = 5.0
"""Longest wait for the bucket's trace; the plan goes on without it."""


class Traces:
    """Finds and keeps one trace per model, by the versions of its files.

    Args:
        store: The node's index.
        origin: The bucket of ``--trace-uri``, or ``None``.
        prefix: Its prefix, empty or ending in a slash.
    """

    def __init__(self, *, store: Store, origin: Origin | None, prefix: str) -> None:
        self._store = store
        self._origin = origin
        self._prefix = prefix

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}.trace.json"

    async def find(self, infos: Sequence[ObjectInfo]) -> list[tuple[ObjectInfo, ByteRange]] | None:
        """Return what an earlier load of exactly these files read, in order, or ``None``."""
        if not infos:
            return None
        name = model_name(infos)
        text = self._store.trace(name)
        if text is None and self._origin is not None:
            text = await self._from_bucket(self._origin, name)
        trace = Trace.from_text(text, infos[0].id.origin) if text is not None else None
        spans = trace.spans({info.id: info for info in infos}) if trace is not None else None
        if text is not None and spans is None:
            log.warning("the trace %s does not fit the model: ignored", name)
        return spans

    async def _from_bucket(self, origin: Origin, name: str) -> bytes | None:
        found: bytes | None = None
        with trio.move_on_after(BUCKET_SECONDS):
            try:
                found = await trio.to_thread.run_sync(
                    origin.get_small, self._key(name), MAX_TEXT_BYTES, abandon_on_cancel=True
                )
            except OriginError as error:
                log.warning("no trace is read: %s", error)
        return found

    async def keep(self, infos: Sequence[ObjectInfo], trace: Trace) -> None:
        """Remember how these files were read."""
        name, text = model_name(infos), trace.to_text()
        if self._origin is not None:
            try:
                await trio.to_thread.run_sync(self._origin.put_small, self._key(name), text, abandon_on_cancel=True)
            except OriginError as error:
                log.warning("the trace stays on this node: %s", error)
        try:
            await self._store.save_trace(name, text)
        except (OSError, lmdb.Error) as error:
            log.warning("the trace cannot be kept: %s", error)
        log.info("kept the order of this load (%d stretches) for the next one", len(trace.touches))
