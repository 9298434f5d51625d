"""How commands talk to a mount's daemon: HTTP over its control socket."""

import http.client
import json
import os
import socket
from typing import Any

from modelfs.errors import AccessDeniedError, DaemonUnreachableError, ModelfsError
from modelfs.fuse.tuning import Mount, control_socket, mount_of

TIMEOUT_SECONDS = 10.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def locate(path: str) -> tuple[Mount, str]:
    """Return the modelfs mount that holds ``path``, and the path relative to it. Never touches the mount.

    Raises:
        DaemonUnreachableError: ``path`` is in no modelfs mount.
    """
    # abspath, not realpath: resolving a link would stat the mount, which may hang.
    absolute = os.path.abspath(path)
    mount = mount_of(absolute) or mount_of(
        os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    )
    if mount is None:
        raise DaemonUnreachableError(f"{path} is not in a modelfs mount", "see: modelfs status")
    inside = absolute if f"{absolute}/".startswith(mount.mountpoint.rstrip("/") + "/") else os.path.realpath(absolute)
    return mount, os.path.relpath(inside, mount.mountpoint).removeprefix(".").lstrip("/")


def ask(mount: Mount, method: str, target: str, body: object = None) -> tuple[int, dict[str, Any]]:
    """Send one request to the mount's daemon; return HTTP status and answer, which is JSON; see ``request``."""
    code, answer = request(mount, method, target, body)
    try:
        return code, json.loads(answer)
    except ValueError as error:
        raise DaemonUnreachableError(f"the daemon of {mount.mountpoint} gives no answer", "see its log") from error


def request(mount: Mount, method: str, target: str, body: object = None) -> tuple[int, bytes]:
    """Send one request to the mount's daemon; return HTTP status and answer.

    Raises:
        DaemonUnreachableError: Nobody answers.
        AccessDeniedError: The socket belongs to another user.
    """
    connection = _UnixConnection(control_socket(mount.mountpoint))
    try:
        connection.request(method, target, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        return response.status, response.read()
    except PermissionError:
        raise AccessDeniedError(
            f"the daemon of {mount.mountpoint} belongs to another user", "run as that user or root"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise DaemonUnreachableError(
            f"the daemon of {mount.mountpoint} does not answer ({error})", "see its log"
        ) from error
    finally:
        connection.close()


def status_of(mount: Mount) -> dict[str, Any]:
    """Return the mount's /v1/status."""
    code, answer = ask(mount, "GET", "/v1/status")
    if code != 200:
        raise ModelfsError(f"the daemon of {mount.mountpoint} answered {code}", "see its log")
    return answer
