"""A front that passes requests on to a real object store, and answers wrongly where it is told to.

A fault is a function of an ``Exchange``: it has the request and may have the real answer, and writes to the client
what it likes. ``Front.faults`` is asked for every GET of an object's range; what it returns happens.
"""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_PIECE = 64 * 1024


@dataclass(eq=False)
class Exchange:
    """One request; ``number`` counts those for ranges of this object, from 1."""

    front: "Front"
    client: socket.socket
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    number: int = 0

    @property
    def range(self) -> tuple[int, int] | None:
        """The bytes asked for, half-open; ``None`` if the request names none."""
        found = {name.lower(): value for name, value in self.headers}.get("range")
        if found is None:
            return None
        first, _, last = found.removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1

    @contextlib.contextmanager
    def answer(self) -> Iterator[http.client.HTTPResponse]:
        """Ask the real store."""
        connection = http.client.HTTPConnection("127.0.0.1", self.front.port, timeout=30)
        connection.putrequest(self.method, self.target, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers:
            connection.putheader(name, value)
        connection.endheaders(self.body or None)
        try:
            yield connection.getresponse()
        finally:
            connection.close()

    def head(self, status: int, reason: str, headers: dict[str, str]) -> None:
        """Send the beginning of an answer."""
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
        self.client.sendall("\r\n".join([*lines, "", ""]).encode())

    def real_head(self, answer: http.client.HTTPResponse, **changed: str) -> int:
        """Send the head of the real answer, with headers changed; return the length of its body."""
        left = {"transfer-encoding", "connection", "keep-alive"}
        headers = {name.lower(): value for name, value in answer.getheaders() if name.lower() not in left}
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        self.head(answer.status, answer.reason, headers)
        return int(answer.getheader("Content-Length") or 0)

    def relay(self) -> None:
        """Answer as the store does."""
        with self.answer() as answer:
            if answer.getheader("Content-Length") is None and self.method != "HEAD":
                body = answer.read()
                self.real_head(answer, content_length=str(len(body)))
                self.client.sendall(body)
                return
            self.real_head(answer)
            self.copy(answer, 1 << 60)

    def copy(self, answer: http.client.HTTPResponse, count: int) -> None:
        """Send so many bytes of the real body, or as many as there are."""
        while count and (piece := answer.read(min(count, _PIECE))):
            self.client.sendall(piece)
            count -= len(piece)


Fault = Callable[[Exchange], None]


class ClosedError(Exception):
    """The connection to the client is to be closed."""


@dataclass(eq=False)
class Front:
    """The front of the store at ``127.0.0.1:port``."""

    port: int
    faults: Callable[[Exchange], Fault | None] = lambda exchange: None
    url: str = ""
    injected: int = 0
    gets: Counter[str] = field(default_factory=Counter)
    down: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self) -> Iterator["Front"]:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        clients: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    if self.down:
                        _reset(client)
                        continue
                    clients.append(client)
                    threading.Thread(target=self._serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield self
        finally:
            self.stopping.set()
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            for client in clients:
                client.close()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ClosedError, http.client.HTTPException, ValueError):
            reader = client.makefile("rb")
            while line := reader.readline():
                method, target, _ = line.decode("latin-1").split(" ", 2)
                headers = []
                while (line := reader.readline().decode("latin-1").strip()) != "":
                    name, _, value = line.partition(":")
                    headers.append((name, value.strip()))
                length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
                exchange = Exchange(self, client, method, target, headers, reader.read(length) if length else b"")
                self._do(exchange)
        client.close()

    def _do(self, exchange: Exchange) -> None:
        if self.down:
            raise ClosedError
        fault = None
        if exchange.method == "GET" and exchange.range is not None:
            with self.lock:
                path = exchange.target.partition("?")[0]
                self.gets[path] += 1
                exchange.number = self.gets[path]
                fault = self.faults(exchange)
                self.injected += fault is not None
        if fault is None:
            exchange.relay()
        else:
            fault(exchange)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# -- faults -----------------------------------------------------------------------------------------


def refuse(status: int, code: str) -> Fault:
    """An error of the store."""

    def fault(exchange: Exchange) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        exchange.head(status, code, {"content-type": "application/xml", "content-length": str(len(body))})
        exchange.client.sendall(body)

    return fault


def _after(count: int, then: Callable[[Exchange, http.client.HTTPResponse], None]) -> Fault:
    """The real head and so many bytes of the body, then something else, and the end of the connection."""

    def fault(exchange: Exchange) -> None:
        with exchange.answer() as answer:
            exchange.real_head(answer)
            exchange.copy(answer, count)
            then(exchange, answer)
        raise ClosedError

    return fault


def reset(after: int) -> Fault:
    """The connection is reset after so many bytes of the body."""
    return _after(after, lambda exchange, answer: _reset(exchange.client))


def cut(after: int) -> Fault:
    """The body ends early, in good order."""
    return _after(after, lambda exchange, answer: None)


def trickle(after: int) -> Fault:
    """From there on a byte per second."""

    def then(exchange: Exchange, answer: http.client.HTTPResponse) -> None:
        while not exchange.front.stopping.wait(1) and (piece := answer.read(1)):
            exchange.client.sendall(piece)

    return _after(after, then)


def hang(after: int) -> Fault:
    """Silence after the head and so many bytes."""
    return _after(after, lambda exchange, answer: exchange.front.stopping.wait() and None)


def swallow(exchange: Exchange) -> None:
    """No answer at all."""
    exchange.front.stopping.wait()
    raise ClosedError


def wrong_range(exchange: Exchange) -> None:
    """Another range than the one asked for, said so in Content-Range."""
    asked = exchange.range
    assert asked is not None
    with exchange.answer() as answer:
        whole = str(answer.getheader("Content-Range")).rpartition("/")[2]
        exchange.real_head(answer, content_range=f"bytes {asked[0] + 1}-{asked[1]}/{whole}")
        exchange.copy(answer, 1 << 60)


def other_version(exchange: Exchange) -> None:
    """The ETag of another version, from a store that ignores If-Match."""
    with exchange.answer() as answer:
        exchange.real_head(answer, etag='"ffffffffffffffffffffffffffffffff"')
        exchange.copy(answer, 1 << 60)


def whole(data: bytes) -> Fault:
    """200 and the whole object, from a store that knows no ranges."""

    def fault(exchange: Exchange) -> None:
        with exchange.answer() as answer:
            etag = str(answer.getheader("ETag"))
        exchange.head(200, "OK", {"etag": etag, "content-length": str(len(data))})
        exchange.client.sendall(data)

    return fault


def wrong_length(by: int) -> Fault:
    """A body of another length than the range; the Content-Length is honest."""

    def fault(exchange: Exchange) -> None:
        with exchange.answer() as answer:
            body = answer.read()
            body = body[:by] if by < 0 else body + bytes(by)
            exchange.real_head(answer, content_length=str(len(body)))
            exchange.client.sendall(body)

    return fault


def flip(at: int) -> Fault:
    """The object's byte at this offset is another one."""

    def fault(exchange: Exchange) -> None:
        asked = exchange.range
        if asked is None or not asked[0] <= at < asked[1]:
            exchange.relay()
            return
        with exchange.answer() as answer:
            exchange.real_head(answer)
            exchange.copy(answer, at - asked[0])
            exchange.client.sendall(bytes((answer.read(1)[0] ^ 1,)))
            exchange.copy(answer, 1 << 60)

    return fault


def redirect(exchange: Exchange) -> None:
    """To a region that is not there."""
    body = b"<Error><Code>TemporaryRedirect</Code><Endpoint>127.0.0.1:9</Endpoint></Error>"
    headers = {"location": "http://127.0.0.1:9/elsewhere", "content-length": str(len(body))}
    exchange.head(307, "Temporary Redirect", headers)
    exchange.client.sendall(body)


def first(count: int, fault: Fault) -> Callable[[Exchange], Fault | None]:
    """The fault happens to the first so many GETs."""
    return lambda exchange: fault if exchange.number <= count else None


def always(fault: Fault) -> Callable[[Exchange], Fault | None]:
    """The fault happens to every GET."""
    return lambda exchange: fault


def storm(share: float, *kinds: Fault) -> Callable[[Exchange], Fault | None]:
    """The kinds in turns happen to a share of all GETs, evenly spread."""

    def choose(exchange: Exchange) -> Fault | None:
        happens = int(exchange.number * share) > int((exchange.number - 1) * share)
        return kinds[int(exchange.number * share) % len(kinds)] if happens else None

    return choose


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
