"""Hours in minutes: many readers, many open files, many keys; memory, descriptors, threads and tasks must stay flat.

``python -m tests.support.soak --minutes 10`` runs it on a real server and prints what it saw; exit status 1 where
something grew, differed or failed. ``make soak`` does.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from modelfs.chunks import MIB
from tests.conftest import Bucket
from tests.support.differential import CAP_MIB, SIZES, Outcome, compare, file_bytes
from tests.support.mounting import Mounted
from tests.support.rgw import rgw

READERS = 200
OPEN_FILES = 1000
SAMPLE_SECONDS = 2.0
ALLOWED = {"rss_mib": 16, "descriptors": 16, "threads": 8, "tasks": 16}
"""By how much the median of the last third may lie above that of the first."""


@dataclass
class Sample:
    """One look at the worker."""

    rss_mib: float
    descriptors: int
    threads: int
    tasks: int

    @classmethod
    def take(cls, mount: Mounted) -> "Sample":
        pid = mount.worker_pid()
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return cls(
            int(status["VmRSS"].split()[0]) / 1024,
            len(os.listdir(f"/proc/{pid}/fd")),
            int(status["Threads"]),
            mount.status()["tasks"],
        )


def grown(samples: list[Sample]) -> dict[str, float]:
    """Return by how much each figure's median grew from the first third to the last."""
    third = max(1, len(samples) // 3)
    return {
        name: statistics.median(getattr(sample, name) for sample in samples[-third:])
        - statistics.median(getattr(sample, name) for sample in samples[:third])
        for name in ALLOWED
    }


def fill(bucket: Bucket, keys: int) -> None:
    for number in range(len(SIZES)):
        bucket.put(f"p/f{number}", file_bytes(number))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: bucket.put(f"p/many/{number // 1000}/{number}", b"%d" % number), range(keys)))


def open_many(mount: Mounted, keys: int) -> list[int]:
    """Open a thousand files and leave them open; every one holds what it should."""
    descriptors = []
    for number in range(min(OPEN_FILES, keys)):
        descriptor = os.open(mount.path / f"many/{number // 1000}/{number}", os.O_RDONLY)
        assert os.read(descriptor, 100) == b"%d" % number
        descriptors.append(descriptor)
    return descriptors


def run(mount: Mounted, seconds: float) -> tuple[list[Sample], Outcome]:
    """Read at random with many threads for so long, and look at the worker meanwhile."""
    deadline, outcomes = time.monotonic() + seconds, []
    reader = threading.Thread(
        target=lambda: outcomes.append(compare(mount.path, 0, READERS, go_on=lambda: time.monotonic() < deadline))
    )
    reader.start()
    samples = []
    while reader.is_alive():
        reader.join(SAMPLE_SECONDS)
        samples.append(Sample.take(mount))
    return samples, outcomes[0]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--keys", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, rgw() as server:
        bucket = Bucket(server.store)
        fill(bucket, arguments.keys)
        options = ["--cache-size", f"{CAP_MIB}MiB", "--min-free", "1MiB", "--max-memory", "64MiB", "--prefetch", "off"]
        began = time.monotonic()
        with Mounted(server.store, [bucket.uri("p/")], Path(home), *options) as mount:
            print(f"{arguments.keys} keys: mounted in {time.monotonic() - began:.1f} s")
            began = time.monotonic()
            found = sum(len(files) for _, _, files in os.walk(mount.path))
            print(f"{found} files walked in {time.monotonic() - began:.1f} s")
            descriptors = open_many(mount, arguments.keys)
            samples, outcome = run(mount, arguments.minutes * 60)
            for descriptor in descriptors:
                os.close(descriptor)
            lives = mount.status()["worker_starts"]
            evicted = mount.status()["cache"]["evicted_bytes"]
        growth = grown(samples)
        print(
            f"{READERS} readers, {len(descriptors)} files open beside: {outcome.reads} reads, "
            f"{outcome.bytes / 1e9:.1f} GB compared, {evicted / MIB / 1024:.1f} GiB evicted; "
            f"{len(outcome.wrong)} differences, {len(outcome.errors)} errors, {lives - 1} restarts"
        )
        for name, allowed in ALLOWED.items():
            last = getattr(samples[-1], name)
            print(f"{name}: {last:.0f} at the end, grown by {growth[name]:.1f} (allowed {allowed})")
    print("\n".join([*outcome.wrong[:10], *outcome.errors[:10]]))
    sound = not outcome.wrong and not outcome.errors and lives == 1 and found == arguments.keys + len(SIZES)
    return 0 if sound and all(growth[name] <= allowed for name, allowed in ALLOWED.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
