"""Where one process ends: the fetch engine on a machine with a free core for every thread, by pretence.

    python -m bench.ceiling [--seconds 6] [--connections 16,32] [--processes 0,1,2]

What the kernel does for a download outside the interpreter lock (receiving, decrypting, writing to disk) is
replaced by sleeping for as long as it takes; what holds the lock stays as it is: the loop, the hand-over between
threads and processes, and the SDK, which makes, signs and parses every GET but whose answer is canned. Without TLS
a slice is one receive; with TLS every record of 16 KiB is. What comes out is the rate at which the lock, and not the
network, is the limit; more processes than there really are cores cannot show what they are worth.
"""

import argparse
import functools
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio
from botocore.awsrequest import AWSResponse

from modelfs.chunks import CHUNK_BYTES, MIB, ByteRange, ObjectId, ObjectInfo
from modelfs.config import OriginConfig, Size, StoreConfig
from modelfs.eviction import Eviction
from modelfs.fetch import Fetch, PlanItem
from modelfs.memory import Memory
from modelfs.metrics import Metrics
from modelfs.origins import Count, Origin, Sink
from modelfs.origins import process as downloads
from modelfs.origins.remote import Processes, RemoteOrigin
from modelfs.origins.s3 import S3Origin
from modelfs.source import Source
from modelfs.store import Store, StoredObject
from modelfs.worker import SWITCH_SECONDS

CONNECTION_RATE = 90_000_000
FIRST_BYTE_SECONDS = 0.02
DISK_RATE = 3_000_000_000
RECORD_BYTES = 16 * 1024
OBJECTS, OBJECT_BYTES = 64, 1024 * MIB
NAME, VERSION = "s3://pretence", '"v"'
SOURCE = Source("pretence", "")
CONFIG = OriginConfig(endpoint_url="http://127.0.0.1:1", region="us-east-1")
AS_PROCESS = "as-process"


class Pretence(S3Origin):
    """Real requests up to the socket, and bodies that take their time but have no bytes."""

    piece = 1024 * MIB

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        super().__init__(source=source, config=config, count=count)
        self.name = NAME
        self._client.meta.events.register("before-send.s3", self._answer)

    def _answer(self, request: Any, **_: object) -> AWSResponse:  # noqa: ANN401
        headers = {"ETag": VERSION, "Content-Type": "binary/octet-stream", "Accept-Ranges": "bytes"}
        return AWSResponse(request.url, 206, headers, io.BytesIO())

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        self._client.get_object(
            Bucket=self._bucket, Key=info.id.key, Range=f"bytes={span.start}-{span.stop - 1}", IfMatch=VERSION
        )
        time.sleep(FIRST_BYTE_SECONDS)
        sink.connected(lambda: None)
        left, due = len(span), time.monotonic()
        while left:
            space = min(left, len(sink.space()))
            done = 0
            while done < space:
                count = min(self.piece, space - done)
                due += count / CONNECTION_RATE
                time.sleep(max(0.0, due - time.monotonic()))
                done += count
            sink.advance(space)
            left -= space


class PretenceTls(Pretence):
    """The same, a record at a time."""

    piece = RECORD_BYTES


class SleepingStore(Store):
    """Remembers chunks; their bytes go nowhere."""

    def write_sync(self, stored: StoredObject, index: int, data: memoryview) -> None:
        time.sleep(len(data) / DISK_RATE)


async def rate(home: Path, origin: Origin, memory: Memory, *, connections: int, seconds: float) -> float:
    """Return bytes per second in the second half of so many seconds of downloading."""
    metrics, budget = Metrics(), (2 * connections + 8) * CHUNK_BYTES
    config = StoreConfig(str(home), Size(bytes=1 << 42), Size(bytes=0))
    store = SleepingStore(config=config, metrics=metrics, holder="bench", budget=budget)
    fetch = Fetch(
        store=store, origins={NAME: origin}, metrics=metrics, budget_bytes=budget, memory=memory, whole_files=True,
        on_failed=lambda info, error: None, max_runs=connections, read_timeout=60,
    )  # fmt: skip
    infos = [ObjectInfo(ObjectId(NAME, f"shard-{number}", VERSION), OBJECT_BYTES, 0) for number in range(OBJECTS)]
    async with trio.open_nursery() as nursery:
        for part in (store, fetch, Eviction(store=store, on_room=fetch.poke)):
            await nursery.start(part.run)
        fetch.submit([PlanItem(info, ByteRange(0, info.size)) for info in infos], 1)
        await trio.sleep(seconds / 2)
        before, began = fetch.received_bytes, time.monotonic()
        await trio.sleep(seconds / 2)
        result = (fetch.received_bytes - before) / (time.monotonic() - began)
        nursery.cancel_scope.cancel()
    store.close()
    return result


def measure(kind: type[Pretence], *, processes: int, connections: int, seconds: float) -> float:
    """Return the rate with so many processes; with none, of threads in this one."""
    with tempfile.TemporaryDirectory(prefix="modelfs-ceiling-") as home:
        task = functools.partial(rate, Path(home), connections=connections, seconds=seconds)
        count = Metrics().origin_counter("s3")
        if not processes:
            return trio.run(task, kind(source=SOURCE, config=CONFIG, count=count), Memory())
        memory = Memory.share()
        program = (sys.executable, "-m", "bench.ceiling", AS_PROCESS, kind.__name__)
        helpers = Processes(
            memory=memory, count=processes, calls=connections + 4, logging=("error", "text"), program=program
        )
        try:
            return trio.run(
                task, RemoteOrigin(place=SOURCE.place, config=CONFIG, processes=helpers, count=count), memory
            )
        finally:
            helpers.stop()


def main() -> None:
    if sys.argv[1:2] == [AS_PROCESS]:
        kind = {kind.__name__: kind for kind in (Pretence, PretenceTls)}[sys.argv[2]]
        downloads.main(sys.argv[3:], lambda _, config, count: kind(source=SOURCE, config=config, count=count))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--connections", default="16,32")
    parser.add_argument("--processes", default="0,1,2")
    arguments = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none")  # signed with, and sent nowhere
    sys.setswitchinterval(SWITCH_SECONDS)
    print(f"{os.cpu_count()} cores\n")
    print("| processes | connections | their rate, GB/s | received | received, TLS |\n|---|---|---|---|---|")
    for processes in map(int, arguments.processes.split(",")):
        for connections in map(int, arguments.connections.split(",")):
            rates = [
                measure(kind, processes=processes, connections=connections, seconds=arguments.seconds) / 1e9
                for kind in (Pretence, PretenceTls)
            ]
            offered = (connections - 2) * CONNECTION_RATE / 1e9  # two are left to demand
            shown = " | ".join(f"{value:.2f}" for value in (offered, *rates))
            print(f"| {processes} | {connections} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
