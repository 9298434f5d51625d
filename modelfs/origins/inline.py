"""Files that lie nowhere: their bytes are the version that their identity names; see ``layout``."""

from collections.abc import Iterator

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.digests import Digest
from modelfs.errors import OriginError
from modelfs.layout import INLINE
from modelfs.origins import Sink


class InlineOrigin:
    """Gives every object its version as content."""

    name = INLINE

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Origin.list``: nothing is kept here."""
        return iter(())

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``: nothing is kept here."""
        return None

    def put_small(self, key: str, data: bytes) -> None:
        """Raise: nothing can be kept here."""
        raise OriginError(f"{key} cannot be written")

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: none is needed."""
        return None

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        """See ``Origin.read_into``."""
        data = info.id.version.encode()[span.start : span.stop]
        while data:
            space = sink.space()
            count = min(len(space), len(data))
            space[:count] = data[:count]
            sink.advance(count)
            data = data[count:]
