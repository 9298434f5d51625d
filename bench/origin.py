"""The object store of the benchmarks: Ceph RGW on loopback, made to look like a distant one.

A shape is what a node sees of its store: bytes per second of one connection, time to the first byte, and
bytes per second of all connections together. The objects stay while only the gateway is restarted.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig

from modelfs.cli.embedded import ObjectStore
from tests.support.certificate import make_certificate
from tests.support.rgw import Rgw, rgw

MIB = 1024 * 1024
BUCKET = "bench"
SERVER_NICENESS = 10


@dataclass(frozen=True, slots=True)
class Shape:
    """How the store answers; 0 means without a limit. Rates in bytes per second."""

    name: str
    connection_rate: int = 0
    first_byte_ms: int = 0
    total_rate: int = 0
    tls: bool = False

    def describe(self) -> str:
        parts = [
            f"{self.connection_rate / 1e6:.0f} MB/s per connection" if self.connection_rate else "",
            f"{self.first_byte_ms} ms to the first byte" if self.first_byte_ms else "",
            f"{self.total_rate / MIB:.0f} MiB/s in all" if self.total_rate else "",
            "TLS" if self.tls else "",
        ]
        return ", ".join(part for part in parts if part) or "no limit"


S3_LIKE = Shape("s3", connection_rate=90_000_000, first_byte_ms=20)
NIC = Shape("nic", connection_rate=90_000_000, first_byte_ms=20, total_rate=400 * MIB)
UNSHAPED = Shape("unshaped")
TLS = Shape("tls", tls=True)


def slow(total_rate: int) -> Shape:
    """Return a shape in which the download outlasts an engine's imports."""
    return Shape("slow", connection_rate=90_000_000, first_byte_ms=20, total_rate=total_rate)


class Origin:
    """A running server whose shape can be changed."""

    def __init__(self, server: Rgw, home: Path) -> None:
        self._server = server
        self._home = home
        self._library = _compile_shaper(home)
        self.client = self._make_client()
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def store(self) -> ObjectStore:
        """The server as it is reached now."""
        return self._server.store

    def _make_client(self) -> Any:  # noqa: ANN401
        return boto3.client(
            "s3",
            endpoint_url=self.store.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.store.access_key,
            aws_secret_access_key=self.store.secret_key,
        )

    def upload(self, directory: Path, prefix: str) -> int:
        """Put every file of ``directory`` under ``prefix``; return the bytes."""
        config = TransferConfig(multipart_chunksize=64 * MIB, max_concurrency=4)
        files = [path for path in sorted(directory.iterdir()) if path.is_file()]
        for path in files:
            self.client.upload_file(str(path), BUCKET, prefix + path.name, Config=config)
        return sum(path.stat().st_size for path in files)

    def reshape(self, shape: Shape) -> None:
        """Restart the gateway with another shape."""
        self._server.stop_gateway()
        environment = {
            "LD_PRELOAD": str(self._library),
            "SHAPER_CONNECTION_RATE": str(shape.connection_rate),
            "SHAPER_FIRST_BYTE_USEC": str(shape.first_byte_ms * 1000),
            "SHAPER_TOTAL_RATE": str(shape.total_rate),
        }
        certificate = self._trust_certificate() if shape.tls else None
        limited = shape.connection_rate or shape.first_byte_ms or shape.total_rate
        self._server.start_gateway(certificate, **(environment if limited else {}))
        self.client = self._make_client()
        self._step_aside()

    def _trust_certificate(self) -> Path:
        """Make a certificate, once, and let every program that is started from here trust it."""
        path, trusted = make_certificate(self._home)
        for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"):
            os.environ[name] = str(trusted)
        return path

    def sent(self) -> tuple[int, int]:
        """Return how many GETs of objects the gateway has answered since its start, and with how many bytes."""
        counters = self._server.counters()
        return counters["get"], counters["get_b"]

    def _step_aside(self) -> None:
        """Give the server a low priority: what it computes would be computed elsewhere."""
        for pid in self._server.pids():
            with contextlib.suppress(OSError):  # where sessions are scheduled as groups, see sched(7)
                Path(f"/proc/{pid}/autogroup").write_text(str(SERVER_NICENESS))
            for task in os.listdir(f"/proc/{pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(task), SERVER_NICENESS)


@contextlib.contextmanager
def origin() -> Iterator[Origin]:
    """Run a server while in the block."""
    with tempfile.TemporaryDirectory(prefix="modelfs-shaper-") as home, rgw() as server:
        yield Origin(server, Path(home))


def _compile_shaper(home: Path) -> Path:
    library = home / "shaper.so"
    source = Path(__file__).with_name("shaper.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl", "-lpthread"], check=True)
    return library
