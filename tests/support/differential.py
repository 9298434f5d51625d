"""Random readers of a mount against a local copy: threads of pread, O_DIRECT and mmap, any length.

``python -m tests.support.differential --reads 100000`` runs it alone, on a real server, with the cache
capped at a third of the data so that eviction runs all the time; ``--kills 200`` kills the worker meanwhile.
"""

import argparse
import mmap
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
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
    errors: list[str] = field(default_factory=list)


def file_bytes(number: int) -> bytes:
    return random.Random(number).randbytes(SIZES[number])


def compare(mountpoint: Path, reads: int, threads: int = 6, *, go_on: Callable[[], bool] = lambda: False) -> Outcome:
    """Do ``reads`` random reads, and more while ``go_on`` says so; return what was compared, and every difference."""
    data = {f"f{number}": file_bytes(number) for number in range(len(SIZES))}
    outcome, lock = Outcome(), threading.Lock()

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        done = total = 0
        wrong: list[str] = []
        target = memoryview(mmap.mmap(-1, 2 * MIB))
        errors: list[str] = []
        while done < reads // threads or go_on():
            name = rng.choice(list(data))
            try:
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
            except OSError as error:
                errors.append(f"{name}: {error}")
        with lock:
            outcome.reads += done
            outcome.bytes += total
            outcome.wrong += wrong
            outcome.errors += errors

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


class Killer:
    """Kills the worker at random moments, and asks how long readers wait after that."""

    def __init__(self, mount: Mounted, kills: int) -> None:
        self._mount = mount
        self._kills = kills
        self._random = random.Random(kills)
        self.waits: list[float] = []
        self.errors: list[str] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        target = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        descriptor = os.open(self._mount.path / "f0", os.O_RDONLY | os.O_DIRECT)
        try:
            for _ in range(self._kills):
                time.sleep(self._random.uniform(0, 1.5))
                os.kill(self._mount.worker_pid(), signal.SIGKILL)
                killed = time.monotonic()
                start = self._random.randrange(SIZES[0] // mmap.PAGESIZE) * mmap.PAGESIZE
                count = os.preadv(descriptor, [target], start)
                self.waits.append(time.monotonic() - killed)
                if bytes(target[:count]) != file_bytes(0)[start : start + count]:
                    self.errors.append(f"other bytes at {start} after kill {len(self.waits)}")
        except OSError as error:
            self.errors.append(f"{error} after kill {len(self.waits)}")
        finally:
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reads", type=int, default=100_000, help="how many, where nothing is killed")
    parser.add_argument("--kills", type=int, default=0, help="read until the worker has been killed so often")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, rgw() as server:
        bucket = Bucket(server.store)
        for number in range(len(SIZES)):
            bucket.put(f"p/f{number}", file_bytes(number))
        options = ["--cache-size", f"{CAP_MIB}MiB", "--min-free", "1MiB", "--max-memory", "32MiB", "--prefetch", "off"]
        with Mounted(server.store, [bucket.uri("p/")], Path(home), *options) as mount:
            began = time.monotonic()
            killer = Killer(mount, arguments.kills)
            killer.thread.start()
            go_on = killer.thread.is_alive if arguments.kills else lambda: False
            outcome = compare(mount.path, arguments.reads if not arguments.kills else 0, go_on=go_on)
            killer.thread.join()
            seconds = time.monotonic() - began
            cache = mount.status()["cache"]
        print(
            f"{outcome.reads} reads, {outcome.bytes / 1e9:.1f} GB compared in {seconds:.0f} s, "
            f"{len(outcome.wrong)} differences, {len(outcome.errors) + len(killer.errors)} errors, "
            f"{cache['evicted_bytes'] / 1e9:.1f} GB evicted by the last worker, cap {CAP_MIB} MiB, "
            f"resident {cache['resident_bytes'] // MIB} MiB of {sum(SIZES) // MIB}"
        )
        if killer.waits:
            print(
                f"{len(killer.waits)} kills; from the kill to the next answered read: "
                f"median {statistics.median(killer.waits):.2f} s, most {max(killer.waits):.2f} s"
            )
        print("\n".join([*outcome.wrong[:10], *outcome.errors[:10], *killer.errors[:10]]))


if __name__ == "__main__":
    main()
