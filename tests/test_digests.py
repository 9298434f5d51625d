"""Digests: computed as published, and read from what publishers write."""

import itertools
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.digests import ALGORITHMS, from_base64, is_sums_name, parse_hub_metadata, parse_sums

CHECK = b"123456789"
SHA256 = "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("crc64nvme", "ae8b14860a799888"),
        ("crc32c", "e3069283"),
        ("crc32", "cbf43926"),
        ("sha256", SHA256),
        ("sha1", "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
        ("md5", "25f9e794323b453885f5181f1b624d0b"),
    ],
)
@given(cuts=st.lists(st.integers(0, len(CHECK)), max_size=4))
def test_algorithms_give_their_check_values_however_the_bytes_come(algorithm, value, cuts):
    hasher = ALGORITHMS[algorithm]()
    borders = [0, *sorted(cuts), len(CHECK)]
    for start, stop in itertools.pairwise(borders):
        hasher.update(memoryview(CHECK)[start:stop])
    assert hasher.hexdigest() == value


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_digest_of_nothing_has_its_full_length(algorithm):
    assert len(ALGORITHMS[algorithm]().hexdigest()) == len(ALGORITHMS[algorithm]().hexdigest().strip())
    assert int(ALGORITHMS[algorithm]().hexdigest(), 16) >= 0


def test_from_base64():
    assert from_base64("rosUhgp5mIg=") == "ae8b14860a799888"
    assert from_base64("rosUhgp5mIg=-12") is None
    assert from_base64("") == ""


def test_parse_sums():
    text = f"""
{SHA256}  plain.bin
{SHA256.upper()} *binary mode.bin
{SHA256}  ./sub/with dot.bin
SHA256 (tagged (1).bin) = {SHA256}
{SHA256}
{SHA256[:-1]}  too-short.bin
-----BEGIN PGP SIGNATURE-----
"""
    assert parse_sums(text, "default") == dict.fromkeys(
        ("plain.bin", "binary mode.bin", "sub/with dot.bin", "tagged (1).bin", "default"), SHA256
    )
    assert "default" not in parse_sums(text)


def test_a_hostile_list_is_read_in_no_time():
    began = time.monotonic()
    assert parse_sums(f"{SHA256}  x{' ' * 1_000_000}y\n{SHA256}  x{' ' * 5000}y\n" + ")" * 100_000) != {}
    assert parse_sums("SHA256 (" + ") = " * 100_000) == {}
    assert time.monotonic() - began < 2


@given(st.text())
def test_parse_sums_takes_any_text(text):
    for path, value in parse_sums(text, "x").items():
        assert path
        assert len(bytes.fromhex(value)) == 32
    parse_hub_metadata(text)


@given(st.binary(max_size=100))
def test_crc32_is_zlibs(data):
    hasher = ALGORITHMS["crc32"]()
    hasher.update(memoryview(data))
    assert int(hasher.hexdigest(), 16) == zlib.crc32(data)


def test_names_of_lists():
    assert all(map(is_sums_name, ("SHA256SUMS", "SHA256SUMS.txt", "sha256sum.txt", "checksums.sha256", "checksum.txt")))
    assert not any(map(is_sums_name, ("model.sha256", "sums", "sha256sums.txt.gz", "README")))


def test_hub_metadata_of_a_small_file_is_a_git_hash_and_no_digest():
    assert parse_hub_metadata(f"{'a' * 40}\n{SHA256}\n1.5\n") == SHA256
    assert parse_hub_metadata(f"{'a' * 40}\n{'b' * 40}\n1.5\n") is None
