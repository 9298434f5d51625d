"""Objects read by plain ranged GETs: what web servers, the Hub and Google Cloud Storage have in common.

Redirections are followed here, and remembered for a while: a signed address serves many ranges. Credentials go only to
the host they are meant for. Proxies are those of the environment. Threads: any.
"""

import email.utils
import html.parser
import re
import threading
import time
import urllib.request
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

import urllib3
import urllib3.exceptions as failures

from modelfs.chunks import ByteRange, ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import Digest
from modelfs.errors import (
    AccessDeniedError,
    EndpointUnreachableError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    ThrottledError,
    TransientOriginError,
)
from modelfs.origins import Count, Sink
from modelfs.origins.body import BROKEN, CONNECT_SECONDS, INACTIVITY_SECONDS, MAX_CONNECTIONS, check_range
from modelfs.origins.retry import RetryingOrigin
from modelfs.source import Source

REDIRECTS = 5
REMEMBER_SECONDS = 300.0
"""How long the place a file was redirected to is used again; signed addresses live longer."""
TEXT_SECONDS = 30.0
"""Longest time for a page or a small file."""
LISTERS = 16
PAGES, LINKS = 10_000, 1_000_000
"""Most directories and files of one listing: a web server may link in circles."""
PAGE_BYTES = 16 * 1024 * 1024
_SIZE_DIGITS = 18
DEPTH = 16
"""Deepest directory of a web server that is looked into."""


class StatusError(Exception):
    """A server's answer that is no success."""

    def __init__(self, status: int, url: str, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status = status
        self.url = url
        self.headers = headers


class HttpOrigin(RetryingOrigin):
    """An origin whose objects have addresses."""

    def __init__(self, count: Count, mend: str) -> None:
        super().__init__(count)
        self._mend = mend
        self._moved: dict[str, tuple[str, float]] = {}
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._pools_lock = threading.Lock()

    @abstractmethod
    def _address(self, info: ObjectInfo) -> tuple[str, dict[str, str]]:
        """Return an object's URL and the headers with which it is asked for."""

    @abstractmethod
    def _check_version(self, info: ObjectInfo, headers: Mapping[str, str]) -> None:
        """Make sure, where the headers tell, that an answer is of this version; raise ``ObjectChangedError``."""

    def put_small(self, key: str, data: bytes) -> None:
        """Raise: nothing is ever written to a source."""
        raise OriginError(f"{self._where(key)} is not written to", "write to s3://")

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = "" if urllib.request.proxy_bypass(parts.netloc) else urllib.request.getproxies().get(parts.scheme, "")
        with self._pools_lock:
            if proxy not in self._pools:
                settings: dict[str, Any] = {
                    "maxsize": MAX_CONNECTIONS,
                    "retries": False,
                    "timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=INACTIVITY_SECONDS),
                }
                self._pools[proxy] = (
                    urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
                )
            return self._pools[proxy]

    def _open(self, method: str, url: str, headers: dict[str, str], info: ObjectInfo | None = None) -> Any:  # noqa: ANN401
        """Send a request and follow redirections; return urllib3's answer, its body not yet read.

        Raises:
            StatusError: The answer is no success.
        """
        first, host = url, urlsplit(url)[:2]
        # What has no version, as a list of sums asked for by its name alone, is always asked for where it is.
        moved = self._moved.get(first) if info is not None else None
        if moved is not None and moved[1] <= time.monotonic():
            moved = None
        if moved is not None:
            url = moved[0]
        for _ in range(REDIRECTS):
            sent = headers if urlsplit(url)[:2] == host else _without_credentials(headers)
            self._count("requests", method.lower(), 1)
            answer = self._pool(url).request(method, url, headers=sent, preload_content=False, redirect=False)
            place = answer.headers.get("Location")
            if answer.status in {301, 302, 303, 307, 308} and place:
                answer.close()  # its body may be endless
                if info is not None:
                    self._check_version(info, answer.headers)
                url = urljoin(url, place)
                if urlsplit(url).scheme not in {"http", "https"}:
                    raise StatusError(answer.status, url, answer.headers)
                continue
            if answer.status >= 300:
                self._moved.pop(first, None)
                answer.close()
                if moved is not None and moved[0] == url:
                    raise TransientOriginError("the address that a redirection gave is not valid any more")
                raise StatusError(answer.status, url, answer.headers)
            if url != first and moved is None and info is not None:
                self._moved[first] = (url, time.monotonic() + REMEMBER_SECONDS)
            return answer
        raise StatusError(310, url, {})

    def _stream(self, client: Any, info: ObjectInfo, span: ByteRange, sink: Sink) -> Iterator[int]:  # noqa: ANN401
        url, headers = self._address(info)
        wanted = {"Accept-Encoding": "identity", **headers, "Range": f"bytes={span.start}-{span.stop - 1}"}
        answer = self._open("GET", url, wanted, info)

        def check() -> None:
            length = answer.headers.get("Content-Length")
            self._check_version(info, answer.headers)
            found = answer.headers.get("Content-Range")
            check_range(self._where(info.id.key), span, info.size, found, int(length) if length else None)

        yield from self._receive(answer, len(span), sink, check)

    def _text(self, url: str, headers: dict[str, str], limit: int) -> bytes:
        answer = self._open("GET", url, {"Accept-Encoding": "identity", **headers})
        found, deadline = bytearray(), time.monotonic() + TEXT_SECONDS
        try:
            while len(found) < limit and (piece := answer.read1(min(65536, limit - len(found)))):
                found += piece
                if time.monotonic() > deadline:
                    raise TransientOriginError(f"a page did not come within {TEXT_SECONDS:.0f} s")
        finally:
            answer.close()
        return bytes(found)

    def _translate(self, error: Exception, key: str) -> OriginError:
        if isinstance(error, OriginError):
            return error
        if isinstance(error, StatusError):
            return self._translate_status(error, key)
        if isinstance(
            error,
            failures.NewConnectionError | failures.ConnectTimeoutError | failures.SSLError | failures.ProxyError,
        ):
            return EndpointUnreachableError(f"cannot connect for {self._where(key)}", "check the host and the network")
        if isinstance(error, BROKEN):
            return TransientOriginError(f"the connection broke while reading {self._where(key)}")
        raise error

    def _translate_status(self, error: StatusError, key: str) -> OriginError:
        where = self._where(key)
        if error.status in {401, 403, 407}:
            return AccessDeniedError(f"access to {where} was denied ({error.status})", self._mend)
        if error.status in {404, 410}:
            return ObjectNotFoundError(f"{where} does not exist any more", "check the source")
        if error.status == 412:
            return ObjectChangedError(f"{where} was overwritten", "open it again to read the new version")
        if error.status == 429 or error.status == 503:
            return ThrottledError(f"the server asks to slow down ({error.status}) for {where}")
        if error.status in {408, 425} or error.status >= 500:
            return TransientOriginError(f"the server failed with {error.status} for {where}")
        return OriginError(f"the server refused {where} ({error.status})", self._mend)


class _Links(html.parser.HTMLParser):
    """Collects where a page's links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take a link."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _links_of(page: str, text: str) -> Iterator[str]:
    """Yield where a page leads below itself: not upwards, to other hosts, or to itself in another order."""
    parser = _Links()
    parser.feed(text)
    for found in parser.found:
        try:
            link = urljoin(page, found)
            parts = urlsplit(link)
        except ValueError:
            continue  # no address at all
        if link.startswith(page) and not parts.query and not parts.fragment:
            yield link


class WebOrigin(HttpOrigin):
    """A web server that lists its directories; keys are paths without the first slash.

    A version is a strong ETag, else the time of change and the size; a server that tells neither is not read.
    """

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        super().__init__(count, "check what the server allows")
        self.name = source.place

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every file that the pages under ``prefix`` link to; see ``Origin.list``."""
        keys = sorted(self._links(prefix))
        if not keys:
            raise ObjectNotFoundError(
                f"{self._where(prefix)} links to no file below it", "the server must list its directories (autoindex)"
            )
        with ThreadPoolExecutor(LISTERS) as pool:
            yield from pool.map(self._stat, keys)

    def _links(self, prefix: str) -> set[str]:
        """Return the keys of the files under ``prefix``, page by page."""
        top = self._url(prefix)
        files: set[str] = set()
        pages, seen = [top], {top}
        for page in pages:
            for link in _links_of(page, self._page(page).decode(errors="replace")):
                if not link.endswith("/"):
                    files.add(unquote(urlsplit(link).path).lstrip("/"))
                elif link not in seen and link.count("/") < top.count("/") + DEPTH:
                    seen.add(link)
                    pages.append(link)
            if len(pages) > PAGES or len(files) > LINKS:
                raise OriginError(
                    f"{self._where(prefix)} links to more than can be listed", "name a directory below it"
                )
        return files

    def _page(self, url: str) -> bytes:
        return self._persist(lambda _: self._text(url, {}, PAGE_BYTES), unquote(urlsplit(url).path).lstrip("/"))

    def _stat(self, key: str) -> ObjectInfo:
        def ask(_: object) -> Mapping[str, str]:
            answer = self._open("HEAD", self._url(key), {"Accept-Encoding": "identity"})
            answer.release_conn()
            headers: Mapping[str, str] = answer.headers
            return headers

        headers = self._persist(ask, key)
        size, version = headers.get("Content-Length", ""), _version(headers, headers.get("Content-Length", ""))
        if not size.isdecimal() or len(size) > _SIZE_DIGITS or not version:
            raise OriginError(
                f"{self._where(key)} has no length or no version",
                "the server must send Content-Length, and ETag or Last-Modified",
            )
        try:
            modified = email.utils.parsedate_tz(headers.get("Last-Modified", ""))
            seconds = email.utils.mktime_tz(modified) if modified else 0
        except (ValueError, OverflowError):
            seconds = 0
        return ObjectInfo(ObjectId(self.name, key, version), int(size), int(seconds) * 10**9)

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""
        try:
            return self._persist(lambda _: self._text(self._url(key), {}, limit), key)
        except ObjectNotFoundError:
            return None

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: a web server keeps none."""
        return None

    def _address(self, info: ObjectInfo) -> tuple[str, dict[str, str]]:
        strong = re.fullmatch('"[^"]*"', info.id.version)
        return self._url(info.id.key), {"If-Match": info.id.version} if strong else {}

    def _check_version(self, info: ObjectInfo, headers: Mapping[str, str]) -> None:
        size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        if "Location" not in headers and _version(headers, size) != info.id.version:
            raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")

    def _url(self, key: str) -> str:
        return f"{self.name}/{quote(key)}"

    def _where(self, key: str) -> str:
        return f"{self.name}/{key}"


def _version(headers: Mapping[str, str], size: str) -> str:
    """Return what tells versions of a file apart, of a partial answer the same as of a whole one; empty if nothing."""
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if etag.startswith('"'):
        return etag
    return f"{etag} {modified} {size}".strip() if modified else ""


def _without_credentials(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in {"authorization", "cookie"}}
