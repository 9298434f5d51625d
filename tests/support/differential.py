"""Random readers of a mount against a local copy: threads of pread, O_DIRECT and mmap, any length.

``python -m tests.support.differential --reads 100000`` runs it alone, on a real server, with the cache
capped at a third of the data so that eviction runs all the time.
"""

import argparse
import mmap
import os
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from modelfs.chunks import CHUNK_BYTES, MIB
from tests.conftest import Bucket
from tests.support.mounting import Mounted
from tests.support.rgw import rgw

SIZES = (5 * CHUNK_BYTES + 77, 6 * CHUNK_BYTES, 4 * CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 4096)
"""Bytes of the files: 18 chunks in all."""
CAP_MIB = 48


@dataclass(slots=True)
class Outcome:
    """What the readers saw."""

    reads: int = 0
    bytes: int = 0
    wrong: list[str] = field(default_factory=list)


def file_bytes(number: int) -> bytes:
    return random.Random(number).randbytes(SIZES[number])


def compare(mountpoint: Path, reads: int, threads: int = 6) -> Outcome:
    """Do ``reads`` random reads in all; return what was compared and every difference."""
    data = {f"f{number}": file_bytes(number) for number in range(len(SIZES))}
    outcome, lock = Outcome(), threading.Lock()

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        done = total = 0
        wrong: list[str] = []
        target = memoryview(mmap.mmap(-1, 2 * MIB))
        while done < reads // threads:
            name = rng.choice(list(data))
            with _Twice(mountpoint / name, target) as file:
                base = rng.randrange(len(data[name]))
                for _ in range(60):
                    start = min(len(data[name]) - 1, base + rng.randrange(2 * MIB))
                    length = rng.choice((1, 511, 4096, rng.randrange(1, 64 * 1024), rng.randrange(1, MIB)))
                    got, start = _read(file, data[name], start, length, rng.random())
                    if got != data[name][start : start + len(got)] or not got:
                        wrong.append(f"{name} at {start}, {length} bytes")
                    done += 1
                    total += len(got)
        with lock:
            outcome.reads += done
            outcome.bytes += total
            outcome.wrong += wrong

    workers = [threading.Thread(target=reader, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return outcome


def _read(file: "_Twice", data: bytes, start: int, length: int, how: float) -> tuple[bytes, int]:
    """Read by pread, around the page cache, or through a mapping; return the bytes and where they begin."""
    if how < 0.3:
        got = os.pread(file.buffered, length, start)
        return (got if len(got) == min(length, len(data) - start) else b""), start
    start &= ~(mmap.PAGESIZE - 1)
    if how < 0.7:
        target = file.target[: length + -length % mmap.PAGESIZE]
        count = os.preadv(file.direct, [target], start)
        return (bytes(target[:count]) if count == min(len(target), len(data) - start) else b""), start
    size = min(length + mmap.PAGESIZE, len(data) - start)
    with mmap.mmap(file.buffered, size, prot=mmap.PROT_READ, offset=start) as mapped:
        return mapped[:], start


class _Twice:
    """One file, open through the page cache and around it."""

    def __init__(self, path: Path, target: memoryview) -> None:
        self._path = path
        self.target = target

    def __enter__(self) -> "_Twice":
        self.buffered = os.open(self._path, os.O_RDONLY)
        self.direct = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        return self

    def __exit__(self, *_: object) -> None:
        os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self.buffered)
        os.close(self.direct)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--kill", action="store_true", help="also kill the worker every two seconds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, rgw() as server:
        bucket = Bucket(server.store)
        for number in range(len(SIZES)):
            bucket.put(f"p/f{number}", file_bytes(number))
        options = ["--cache-size", f"{CAP_MIB}MiB", "--min-free", "1MiB", "--max-memory", "32MiB", "--prefetch", "off"]
        with Mounted(server.store, [bucket.uri("p/")], Path(home), *options) as mount:
            stop = threading.Event()
            kills = 0

            def kill() -> None:
                nonlocal kills
                while not stop.wait(2):
                    mount.kill_worker()
                    kills += 1

            killer = threading.Thread(target=kill)
            if arguments.kill:
                killer.start()
            began = time.monotonic()
            outcome = compare(mount.path, arguments.reads)
            seconds = time.monotonic() - began
            stop.set()
            if arguments.kill:
                killer.join()
            cache = mount.status()["cache"]
        print(
            f"{outcome.reads} reads, {outcome.bytes / 1e9:.1f} GB compared in {seconds:.0f} s, "
            f"{len(outcome.wrong)} differences, "
            f"{kills} kills, {cache['evicted_bytes'] / 1e9:.1f} GB evicted by the last worker, cap {CAP_MIB} MiB, "
            f"resident {cache['resident_bytes'] // MIB} MiB of {sum(SIZES) // MIB}"
        )
        print("\n".join(outcome.wrong[:10]))


if __name__ == "__main__":
    main()
