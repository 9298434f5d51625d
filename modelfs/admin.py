"""HTTP of one mount: metrics, health, readiness and status on loopback, control on a unix socket.

The TCP side only reads. ``POST`` is answered on the unix socket alone, whose mode 0600 says who may.
Knows how to speak, not how anything is computed: answers come from the callables it is given.
"""

import json
import logging
import os
import socket
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import trio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from modelfs.errors import ConfigError

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
BODY_LIMIT_BYTES = 1024 * 1024
_CLIENTS = 32


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server can be asked; each returns plain data.

    ``readiness`` takes a path and whether every file counts, and returns ``None`` for an unknown path.
    ``control`` takes the last part of the POST path and the JSON body, and returns ``None`` for an unknown command.
    """

    registry: CollectorRegistry
    status: Callable[[], dict[str, Any]]
    readiness: Callable[[str, bool], dict[str, Any] | None]
    control: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any] | None]]


class Admin:
    """The server.

    Args:
        answers: What is served.
        address: ``host:port`` or ``off``.
        socket_path: The control socket.
    """

    def __init__(self, *, answers: Answers, address: str, socket_path: str) -> None:
        self._answers = answers
        self._address = address
        self._socket_path = Path(socket_path)
        self._clients = trio.CapacityLimiter(_CLIENTS)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; a port in use is a warning, not the end of a mount."""
        listeners = [self._control_listener()]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._serve_control, listeners)
                if self._address != "off":
                    host, _, port = self._address.rpartition(":")
                    try:
                        opened = await trio.open_tcp_listeners(int(port), host=host.strip("[]"))
                    except OSError as error:
                        log.warning(
                            "admin address %s cannot be used (%s): choose another --admin",
                            self._address,
                            error.strerror,
                        )
                    else:
                        nursery.start_soon(trio.serve_listeners, self._serve_public, opened)
                task_status.started()
        finally:
            self._socket_path.unlink(missing_ok=True)

    def _control_listener(self) -> trio.SocketListener:
        directory = self._socket_path.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for above in (directory, directory.parent):
            # In /tmp another user may have taken the name first, and could put a socket of his own in our place.
            if above.stat().st_uid not in {0, os.geteuid()}:
                raise ConfigError(
                    f"{above}, where the control socket belongs, is another user's", "set XDG_RUNTIME_DIR"
                )
        self._socket_path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self._socket_path))
        finally:
            os.umask(mask)
        listener.listen(16)
        return trio.SocketListener(trio.socket.from_stdlib_socket(listener))

    async def _serve_control(self, stream: trio.SocketStream) -> None:
        await self._serve(stream, control=True)

    async def _serve_public(self, stream: trio.SocketStream) -> None:
        await self._serve(stream, control=False)

    async def _serve(self, stream: trio.SocketStream, *, control: bool) -> None:
        """Answer one request and close; a slow or broken client costs nothing but its own time."""
        async with self._clients, stream:
            connection = h11.Connection(h11.SERVER)
            with trio.move_on_after(REQUEST_SECONDS):
                try:
                    request, body = await _receive(stream, connection)
                    status, kind, data = await self._answer(request, body, control=control)
                    headers = [("content-type", kind), ("content-length", str(len(data))), ("connection", "close")]
                    out = connection.send(h11.Response(status_code=status, headers=headers)) or b""
                    if request.method != b"HEAD":
                        out += connection.send(h11.Data(data=data)) or b""
                    await stream.send_all(out)
                except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
                    return

    async def _answer(self, request: h11.Request, body: bytes, *, control: bool) -> tuple[int, str, bytes]:
        target = urllib.parse.urlsplit(request.target.decode("ascii", "replace"))
        query = urllib.parse.parse_qs(target.query)
        try:
            if request.method == b"POST":
                return await self._post(target.path, body, control=control)
            if request.method not in {b"GET", b"HEAD"}:
                return _json(405, {"error": "only GET"})
            return self._get(target.path, query)
        except Exception:
            log.exception("unexpected failure while answering %s", target.path)
            return _json(500, {"error": "internal error, see the log"})

    def _get(self, path: str, query: dict[str, list[str]]) -> tuple[int, str, bytes]:
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._answers.registry)
        if path == "/healthz":
            return _json(200, {"ok": True})
        if path == "/readyz":
            return self._ready(query)
        if path == "/v1/status":
            return _json(200, self._answers.status())
        return _json(404, {"error": "no such page; there are /metrics, /healthz, /readyz, /v1/status"})

    def _ready(self, query: dict[str, list[str]]) -> tuple[int, str, bytes]:
        """``?path=`` names a file or directory, ``min`` a resident share from 0 to 1, ``all`` counts every file."""
        path = query.get("path", [""])[0].strip("/")
        try:
            least = float(query.get("min", ["0"])[0])
        except ValueError:
            return _json(400, {"error": "min is not a number from 0 to 1"})
        state = self._answers.readiness(path, "all" in query)
        if state is None:
            return _json(404, {"error": "no such path in the mount"})
        return _json(200 if state["share"] >= least else 503, state)

    async def _post(self, path: str, body: bytes, *, control: bool) -> tuple[int, str, bytes]:
        if not control:
            return _json(403, {"error": "commands are taken on the control socket only"})
        try:
            data = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return _json(400, {"error": "the body is not JSON"})
        if not isinstance(data, dict):
            return _json(400, {"error": "the body is not a JSON object"})
        answer = await self._answers.control(path.removeprefix("/v1/"), data)
        return _json(404, {"error": "no such command"}) if answer is None else _json(200, answer)


async def _receive(stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request, bytes]:
    """Read one request.

    Raises:
        h11.RemoteProtocolError: Not HTTP, ended early, or a body beyond the limit.
    """
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_LIMIT_BYTES:
                raise h11.RemoteProtocolError("body too large")
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, body
        else:
            raise h11.RemoteProtocolError("connection ended early")


def _json(status: int, data: object) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(data).encode() + b"\n"
