"""What all origins share: failed requests are tried again, broken bodies resumed at the byte they reached.

A subclass says what one request is, and translates every exception of its libraries into ``errors``.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.errors import AccessDeniedError, EndpointUnreachableError, OriginError, TransientOriginError
from modelfs.origins import Count, Sink
from modelfs.origins.body import Body

ATTEMPTS = 6
"""Tries without one new byte; every byte gained starts the count again."""
BACKOFF_SECONDS = 0.1
BACKOFF_CAP_SECONDS = 5.0

_Answer = TypeVar("_Answer")


class RetryingOrigin(ABC):
    """An origin whose requests are repeated where that may help.

    Args:
        count: Takes counts.
        client: What requests are made with; handed to them, so that ``_renew`` knows which one was refused.
    """

    def __init__(self, count: Count, client: Any = None) -> None:  # noqa: ANN401
        self._count = count
        self._client = client

    @abstractmethod
    def _where(self, key: str) -> str:
        """Return how a message names the object."""

    @abstractmethod
    def _translate(self, error: Exception, key: str) -> OriginError:
        """Turn a library's exception into a domain error; what is no network matter is raised again."""

    @abstractmethod
    def _stream(self, client: Any, info: ObjectInfo, span: ByteRange, sink: Sink) -> Iterator[int]:  # noqa: ANN401
        """Make one request for ``span``; yield the number of bytes received at a time; end early when the body does."""

    def _renew(self, refused: Any) -> bool:  # noqa: ANN401
        """Put another client in place of the ``refused`` one; return whether trying again makes sense."""
        return False

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        """Download ``span`` into ``sink``, resuming as needed; see ``Origin.read_into``."""
        position, attempt = span.start, 0
        while position < span.stop:
            before, client = position, self._client
            try:
                for count in self._stream(client, info, ByteRange(position, span.stop), sink):
                    position += count
                if position == span.stop:
                    return
                raise TransientOriginError(
                    f"the body of {self._where(info.id.key)} ended {span.stop - position} bytes early"
                )
            except Exception as error:  # noqa: BLE001 - translated, or raised again
                failure = self._translate(error, info.id.key)
                cause = error.__cause__ if failure is error else error
            if position > before:
                attempt = 0
            if not self._worth_retry(failure, attempt, client):
                raise failure from cause
            if position > span.start:
                self._count("resumes", "", 1)
            _pause(attempt)
            attempt += 1

    def _receive(self, raw: Any, length: int, sink: Sink, check: Callable[[], None]) -> Iterator[int]:  # noqa: ANN401
        """Take the body of urllib3's answer ``raw``, once ``check`` has nothing against it; see ``_stream``."""
        left, finished = length, False
        try:
            check()
            body = Body(raw, left)
            sink.connected(body.abort)
            while left:
                count = body.into(sink.space())
                if not count:
                    return
                sink.advance(count)
                left -= count
                yield count
            body.finish()
            raw.release_conn()
            finished = True
        finally:
            self._count("bytes", "", length - left)
            if not finished:
                raw.close()

    def _persist(self, ask: Callable[[Any], _Answer], key: str) -> _Answer:
        """Call ``ask`` until it succeeds, fails for good, or has failed too often."""
        for attempt in range(ATTEMPTS):
            client = self._client
            try:
                return ask(client)
            except Exception as error:
                failure = self._translate(error, key)
                if not self._worth_retry(failure, attempt, client):
                    raise failure from error
            _pause(attempt)
        raise AssertionError("the last attempt raises")

    def _worth_retry(self, failure: OriginError, attempt: int, client: Any) -> bool:  # noqa: ANN401
        """Count the failure; return whether to try again after ``attempt`` earlier ones without progress."""
        kind = type(failure).__name__.removesuffix("Error")
        self._count("errors", kind, 1)
        if attempt + 1 >= ATTEMPTS or (isinstance(failure, EndpointUnreachableError) and attempt >= 2):
            return False
        if failure.retryable:
            return True
        return isinstance(failure, AccessDeniedError) and attempt == 0 and self._renew(client)


def _pause(attempt: int) -> None:
    """Wait with full jitter before the next try."""
    time.sleep(random.uniform(0, min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2**attempt)))
