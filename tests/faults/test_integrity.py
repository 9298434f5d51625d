"""Bytes that are not the publisher's: found, fetched once more, and refused where that was asked for."""

import hashlib
import mmap
import os
import random
import time

import pytest

from modelfs.chunks import CHUNK_BYTES
from tests.faults import front as faults
from tests.faults.front import always, first
from tests.support.mounting import run

DATA = random.Random(7).randbytes(2 * CHUNK_BYTES + 77)
SHA256 = hashlib.sha256(DATA).hexdigest()
NAME = "model.safetensors"
OTHER = "0" * 64


def publish(bucket, text=f"{SHA256}  {NAME}\n", name=f"{NAME}.sha256"):
    bucket.put(f"m/{NAME}", DATA)
    bucket.put(f"m/{name}", text.encode())


def digest_of(mount, name=NAME):
    return os.getxattr(mount.path / name, "user.modelfs.digest").decode()


def wait_for_digest(mount, wanted, seconds=20):
    assert faults.wait_for(lambda: digest_of(mount) == wanted, seconds), (digest_of(mount), mount.log)


def only_weights(fault):
    """A fault of the weights' requests; the small files are whole."""
    return lambda exchange: fault if NAME + ".sha256" not in exchange.target else None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (f"{NAME}.sha256", SHA256),
        (f"{NAME}.sha256", f"{SHA256} *{NAME}\n"),
        ("SHA256SUMS", f"# weights\n{OTHER}  other\n{SHA256}  ./{NAME}\n"),
        ("sha256sum.txt", f"SHA256 ({NAME}) = {SHA256.upper()}\n"),
        (f".cache/huggingface/download/{NAME}.metadata", f"{'a' * 40}\n{SHA256}\n1700000000.5\n"),
    ],
)
def test_a_file_is_verified_by_what_its_publisher_wrote(bucket, mounted, name, text):
    publish(bucket, text, name)
    mount = mounted(bucket, "--verify", "strict", prefix="m/")
    assert (mount.path / NAME).read_bytes() == DATA
    wait_for_digest(mount, "verified")
    mount.stop()
    again = mounted(bucket, "--verify", "strict", "--prefetch", "off", prefix="m/")
    assert digest_of(again) == "verified", "kept with the chunks"
    assert again.metrics().get('modelfs_verified_files_total{result="verified"}', 0) == 0


def test_strict_hands_a_file_to_the_kernel_once_it_is_verified(bucket, mounted):
    publish(bucket)
    mount = mounted(bucket, "--verify", "strict", prefix="m/")
    wait_for_digest(mount, "verified")
    with (mount.path / NAME).open("rb") as file:
        assert file.read() == DATA
        files = mount.status()["sources"][0]["files"]
    assert [(one["digest"], one["in_use"]) for one in files if one["path"] == NAME] == [("verified", "passthrough")]


@pytest.mark.parametrize("mode", ["off", "background", "strict"])
def test_one_wrong_byte_on_the_way_is_found_and_fetched_again(bucket, mounted, front, table, mode):
    publish(bucket)
    front.faults = only_weights(faults.flip(CHUNK_BYTES - 5))
    mount = mounted(bucket, "--endpoint-url", front.url, "--prefetch", "off", "--verify", mode, prefix="m/")
    wrong = (mount.path / NAME).read_bytes()
    assert wrong != DATA, "nobody can know this while it streams"
    front.faults = lambda exchange: None
    began = time.monotonic()
    if mode == "strict":
        wait_for_digest(mount, "verified")
    else:
        done = run("verify", str(mount.path / NAME))
        assert done.returncode == 0, (done.stderr, mount.log)
        assert "1 verified, 0 bad" in done.stdout
    assert digest_of(mount) == "verified"
    assert (mount.path / NAME).read_bytes() == DATA, "nor does the kernel keep pages of it once it is opened again"
    metrics = mount.metrics()
    assert metrics['modelfs_verified_files_total{result="refetched"}'] == 1
    assert f"{NAME}.sha256 says {SHA256}" in mount.log
    assert "Traceback" not in mount.log
    table.injected += front.injected
    table.compared += len(DATA)
    if mode == "strict":
        table.add(
            "one byte wrong on the way, --verify strict", "the right bytes, once the file is complete",
            time.monotonic() - began, 'modelfs_verified_files_total{result="refetched"}',
        )  # fmt: skip


def test_strict_refuses_what_does_not_match_twice(bucket, mounted, table):
    publish(bucket, f"{OTHER}  {NAME}\n")
    mount = mounted(bucket, "--prefetch", "off", "--verify", "strict", prefix="m/")
    file = os.open(mount.path / NAME, os.O_RDONLY)
    began = time.monotonic()
    with mmap.mmap(file, len(DATA), prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == DATA, "served while it streams"
    wait_for_digest(mount, "bad")
    seconds = time.monotonic() - began
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.raises(OSError, match="Input/output"):
        os.pread(file, 4096, 0)
    with pytest.raises(OSError, match="Input/output"):
        (mount.path / NAME).open("rb")
    mount.kill_worker()
    with pytest.raises(OSError, match="Input/output"):
        os.pread(file, 4096, 0)
    os.close(file)
    with pytest.raises(OSError, match="Input/output"):
        (mount.path / NAME).open("rb")
    assert "is bad, also after it was fetched once more: reads of it fail" in mount.log
    done = run("verify", str(mount.path))
    assert done.returncode == 10
    assert "1 files do not match their digest" in done.stderr
    assert f"bad       {NAME}" in done.stdout
    assert mount.metrics()['modelfs_verified_files_total{result="bad"}'] >= 1
    mount.stop()
    again = mounted(bucket, "--prefetch", "off", "--verify", "strict", prefix="m/")
    with pytest.raises(OSError, match="Input/output"):
        (again.path / NAME).open("rb")
    again.stop()
    lenient = mounted(bucket, "--prefetch", "off", prefix="m/")
    assert (lenient.path / NAME).read_bytes() == DATA
    table.compared += len(DATA)
    table.add(
        "bytes that do not match the publisher's digest, --verify strict", "EIO, once the file is complete",
        seconds, 'modelfs_verified_files_total{result="bad"}',
    )  # fmt: skip


def test_damage_on_the_disk_is_no_fault_of_the_publisher(bucket, mounted):
    publish(bucket)
    mount = mounted(bucket, "--verify", "off", prefix="m/")
    mount.wait_complete()
    time.sleep(1.5)  # committed
    data_file = max((mount.cache / "data").iterdir(), key=lambda path: path.stat().st_size)
    with data_file.open("r+b", buffering=0) as file:
        file.seek(CHUNK_BYTES + 100)
        file.write(b"rotten")
        os.fsync(file.fileno())
    done = run("verify", str(mount.path))
    assert done.returncode == 0, "the damaged chunk is dropped and fetched, and all hashed again"
    assert "2 verified" in done.stdout
    assert mount.metrics()["modelfs_store_corrupt_chunks_total"] == 1
    assert (mount.path / NAME).read_bytes() == DATA


def test_verify_says_what_it_cannot_verify(bucket, mounted):
    bucket.put("m/a.bin", b"a" * 100)
    bucket.put("m/b.bin", b"b" * 100)
    mount = mounted(bucket, "--prefetch", "off", prefix="m/")
    assert (mount.path / "a.bin").read_bytes() == b"a" * 100
    done = run("verify", str(mount.path))
    assert done.returncode == 9
    assert "1 verified, 0 bad, 0 without a digest, 1 not local" in done.stdout, "RGW's ETag is an MD5"
    assert "1 files are not local and were not verified: run modelfs warm first" in done.stderr
    assert run("verify", str(mount.path / "nothing")).returncode == 3
    assert run("verify").returncode == 2
    assert run("verify", "--all", str(mount.path)).returncode == 2
    done = run("verify", str(mount.path / "a.bin"), "--json")
    assert done.returncode == 0
    assert '"verified": 1' in done.stdout


def test_every_byte_wrong_for_good_is_bad(bucket, mounted, front):
    """The store's own bytes have changed under the digest that it keeps of them."""
    bucket.put(f"m/{NAME}", DATA)
    front.faults = always(faults.flip(100))
    mount = mounted(bucket, "--endpoint-url", front.url, "--verify", "strict", prefix="m/")
    wait_for_digest(mount, "bad")
    assert "md5 of" in mount.log
    assert "ETag says" in mount.log
    front.faults = first(0, faults.flip(0))
    done = run("verify", str(mount.path))
    assert done.returncode == 0, "asked anew, it is fetched once more"
    assert (mount.path / NAME).read_bytes() == DATA
