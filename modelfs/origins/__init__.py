"""Object stores: the ``Origin`` protocol and one module per kind.

An origin knows neither chunks nor caches nor FUSE. Its methods block and are called from worker
threads; retries of single requests, resuming of broken bodies and the translation of every library
exception into ``errors`` happen here and nowhere above.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.digests import Digest

Count = Callable[[str, str, int], None]
"""Takes what happened (``requests``, ``errors``, ``resumes`` or ``bytes``), its kind if it has one, and how often."""


class Sink(Protocol):
    """Where the bytes of a download go, in order."""

    def space(self) -> memoryview:
        """Return the next free bytes to fill, at least one; raise to give the download up."""

    def advance(self, count: int) -> None:
        """Say that the first ``count`` bytes of the last ``space`` are filled."""

    def connected(self, abort: Callable[[], None]) -> None:
        """Take the means to break off the wait for the network, callable from any thread."""


class Origin(Protocol):
    """One bucket, or what takes its place elsewhere."""

    @property
    def name(self) -> str:
        """Identity of the bucket: equal names hold equal objects."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key begins with ``prefix``, in the store's order.

        Raises:
            OriginError: The listing failed; nothing partial is to be used.
        """

    def get_small(self, key: str, limit: int) -> bytes | None:
        """Return the first ``limit`` bytes of an object, or ``None`` if there is none.

        Raises:
            OriginError: It cannot be read.
        """

    def put_small(self, key: str, data: bytes) -> None:
        """Write an object.

        Raises:
            OriginError: It cannot be written.
        """

    def digest(self, info: ObjectInfo) -> Digest | None:
        """Return the digest of the whole object that the store keeps, the strongest; ``None`` if it keeps none.

        Raises:
            ObjectChangedError: The object has another version now.
            OriginError: The store cannot be asked.
        """

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        """Download exactly ``span`` of exactly this object version into ``sink``.

        A body that breaks or stalls is resumed at the byte it reached.

        Raises:
            ObjectChangedError: The object has another version now.
            OriginError: The bytes cannot be had.
        """
