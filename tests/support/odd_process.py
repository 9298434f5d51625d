"""A process that downloads and fails in a way that nobody foresaw."""

import sys
from collections.abc import Iterator

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.origins import Sink
from modelfs.origins.process import main
from modelfs.origins.s3 import S3Origin
from modelfs.source import parse_source


class OddOrigin(S3Origin):
    """Lists and reads nothing."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        raise KeyError(prefix)

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        raise OSError("odd")


main(sys.argv[1:], lambda place, config, count: OddOrigin(source=parse_source(place), config=config, count=count))
