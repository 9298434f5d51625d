"""An object store for demo and tests: the ``ministack`` emulator on a loopback port, in its own process.

It is no dependency of modelfs: the program is found through ``MODELFS_MINISTACK`` or on PATH.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from modelfs.errors import ConfigError, EndpointUnreachableError

START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A running server and the key pair it accepts."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Return the variables the AWS SDK reads."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_http(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until ``url`` answers anything.

    Raises:
        EndpointUnreachableError: It did not within 20 s, or the process ended.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError as error:
            error.close()  # an answer all the same
            return
        except OSError:
            time.sleep(0.02)
    raise EndpointUnreachableError(f"the object store at {url} did not start", "see its output above")


@contextlib.contextmanager
def ministack() -> Iterator[ObjectStore]:
    """Run ministack while in the block.

    Raises:
        ConfigError: The program is not installed.
        EndpointUnreachableError: It did not start.
    """
    program = os.environ.get("MODELFS_MINISTACK") or shutil.which("ministack")
    if not program:
        raise ConfigError("no embedded object store", "install ministack, or run: make demo")
    port = free_port()
    store = ObjectStore(f"http://127.0.0.1:{port}", "AKROOT", "ROOTSECRET")
    environment = {
        **os.environ,
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3,iam,sts",
        "AUTH": "true",
        "LOG_LEVEL": "ERROR",
        "IOT_MTLS_ENABLED": "0",
        "DOCKER_HOST": "unix:///nonexistent",
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
    }
    process = subprocess.Popen(
        [program], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        await_http(store.endpoint_url, process)
        yield store
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
