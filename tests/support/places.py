"""The places where objects can lie, each with a real server or its closest stand-in, for the conformance tests."""

import base64
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from azure.storage.blob import BlobServiceClient
from gcsfs.core import GCSFileSystem

from modelfs.cli.embedded import await_http, free_port
from tests.support.certificate import make_certificate
from tests.support.hub import TOKEN, Hub

AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of the emulator's account, as its documentation tells everybody."""


@dataclass(frozen=True)
class Place:
    """Where tests put objects.

    ``environment`` has the credentials, ``wrong`` such that are refused where there are any; under ``missing`` there is
    nothing.
    """

    uri: str
    put: Callable[[str, bytes], None]
    delete: Callable[[str], None]
    environment: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    missing: str = ""


@contextlib.contextmanager
def running(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a session of its own, and stop it by pid."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def directory(home: Path) -> Iterator[Place]:
    """A directory of files."""
    top = home / f"files-{uuid.uuid4().hex}"
    top.mkdir()

    def put(key: str, data: bytes) -> None:
        path = top / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    yield Place(f"file://{top}/", put, lambda key: (top / key).unlink(), missing=f"file://{top}-not/")


@contextlib.contextmanager
def nginx(home: Path) -> Iterator[Place]:
    """nginx over TLS, with lists of its directories."""
    with directory(home) as files:
        top = urllib.parse.urlsplit(files.uri).path
        both, trusted = make_certificate(home)
        port = free_port()
        configuration = home / f"nginx-{port}.conf"
        configuration.write_text(f"""
            daemon off; pid {home}/nginx-{port}.pid; error_log {home}/nginx-{port}.log; worker_processes 1;
            {"user root;" if os.geteuid() == 0 else ""}
            events {{ worker_connections 512; }}
            http {{
                access_log off; client_body_temp_path {home}/t; proxy_temp_path {home}/t; fastcgi_temp_path {home}/t;
                uwsgi_temp_path {home}/t; scgi_temp_path {home}/t; types {{ }} default_type application/octet-stream;
                server {{
                    listen 127.0.0.1:{port} ssl; ssl_certificate {both}; ssl_certificate_key {both};
                    root {top}; autoindex on;
                    location ~ /$ {{ types {{ }} default_type text/html; autoindex on; }}
                }}
            }}""")
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        with running(program, "-c", configuration, "-p", home, "-e", home / f"nginx-{port}.log") as process:
            await_http(f"http://127.0.0.1:{port}/", process)  # a plain request is refused, which is an answer
            environment = {"SSL_CERT_FILE": str(trusted)}
            url = f"https://127.0.0.1:{port}/"
            later = itertools.count(int(time.time()), 10)

            def put(key: str, data: bytes) -> None:
                files.put(key, data)
                seconds = next(later)  # its ETag is made of whole seconds and the size
                os.utime(f"{top}{key}", (seconds, seconds))

            yield Place(url, put, files.delete, environment, missing=f"{url}not/")


@contextlib.contextmanager
def hub(home: Path) -> Iterator[Place]:
    """A gated repository of the Hub look-alike."""
    name = f"org-{uuid.uuid4().hex[:8]}/model"
    with Hub().running() as server:
        repository = server.repository(name)
        repository.gated = True
        yield Place(
            f"hf://{name}/",
            lambda key, data: repository.commit(**{key: data}) and None,
            lambda key: repository.commit(**{key: None}) and None,
            {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN},
            {"HF_TOKEN": "hf_CANARYWRONG"},
            "hf://no/such",
        )


@contextlib.contextmanager
def gcs(home: Path) -> Iterator[Place]:
    """A bucket of the emulator of Google Cloud Storage; it checks no credentials."""
    bucket, port = f"test-{uuid.uuid4().hex[:12]}", free_port()
    program = shutil.which("gcp-storage-emulator") or Path(sys.executable).with_name("gcp-storage-emulator")
    with running(program, "start", "--host=127.0.0.1", f"--port={port}", "-M", "-q", f"--default-bucket={bucket}") as p:
        url = f"http://127.0.0.1:{port}"
        await_http(url, p)

        files = GCSFileSystem(endpoint_url=url, token="anon", skip_instance_cache=True)

        def put(key: str, data: bytes) -> None:
            with warnings.catch_warnings(category=ResourceWarning, action="ignore"):  # of aiohttp: a large body
                files.pipe_file(f"{bucket}/{key}", data)

        yield Place(
            f"gs://{bucket}/",
            put,
            lambda key: files.rm_file(f"{bucket}/{key}"),
            {"STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"},
            missing="gs://no-such-bucket-1/",
        )


@contextlib.contextmanager
def azurite(home: Path) -> Iterator[Place]:
    """A container of the emulator of Azure Blob Storage, with its well-known account."""
    container, port = f"test-{uuid.uuid4().hex[:12]}", free_port()
    program = os.environ.get("MODELFS_AZURITE")
    if not program:
        pytest.fail("run: make test-places")
    options = (
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        str(port),
        "--inMemoryPersistence",
        "--silent",
        "--skipApiVersionCheck",
    )
    with running(program, *options, "--disableTelemetry") as process:
        await_http(f"http://127.0.0.1:{port}/", process)

        def connection(key: str) -> str:
            return (
                f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
                f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1"
            )

        files = BlobServiceClient.from_connection_string(connection(AZURITE_KEY)).create_container(container)
        yield Place(
            f"az://{container}/",
            lambda key, data: files.upload_blob(key, data, overwrite=True) and None,
            files.delete_blob,
            {"AZURE_STORAGE_CONNECTION_STRING": connection(AZURITE_KEY)},
            {"AZURE_STORAGE_CONNECTION_STRING": connection(base64.b64encode(b"CANARY").decode())},
            "az://no-such-container/",
        )
        files.close()


PLACES = {"file": directory, "https": nginx, "hf": hub, "gs": gcs, "az": azurite}
