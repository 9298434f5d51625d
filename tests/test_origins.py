"""What every origin must do, on real servers and on the fake one."""

import base64
import hashlib
import random
import re
import threading
import time
from typing import ClassVar

import pytest

from modelfs.chunks import MIB, ByteRange, ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import ALGORITHMS
from modelfs.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    EndpointUnreachableError,
    NoCredentialsError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
)
from modelfs.metrics import Metrics
from modelfs.origins.s3 import S3Origin
from modelfs.source import Source
from tests.support.certificate import make_certificate
from tests.support.served import Quiet, served


class Collect:
    """A sink that keeps the bytes."""

    def __init__(self, limit=1000):
        self.data = bytearray()
        self._buffer = memoryview(bytearray(limit))

    def space(self):
        return self._buffer

    def advance(self, count):
        self.data += self._buffer[:count]

    def connected(self, abort):
        assert callable(abort)


@pytest.fixture
def setting(any_store, new_bucket, monkeypatch):
    for name, value in any_store.environment().items():
        monkeypatch.setenv(name, value)
    return new_bucket(any_store)


def origin(bucket_name, **config):
    return S3Origin(source=Source(bucket_name, ""), config=OriginConfig(**config), count=Metrics().origin_counter("s3"))


def listed(setting, key) -> ObjectInfo:
    return next(info for info in origin(setting.name).list(key) if info.id.key == key)


def get(setting, info, start, stop):
    sink = Collect()
    origin(setting.name).read_into(info, ByteRange(start, stop), sink)
    return bytes(sink.data)


def test_list_gives_every_key_with_size_and_version(setting):
    keys = {"p/a b", "p/ä/模型", "p/plus+%25", "p/q?x=1&y", "p/deep/er/f", "q/other"}
    for key in keys:
        setting.put(key, key.encode())
    found = list(origin(setting.name).list("p/"))
    assert {info.id.key for info in found} == keys - {"q/other"}
    assert all(info.size == len(info.id.key.encode()) and info.id.version and info.mtime_ns for info in found)


def test_listing_goes_over_pages(setting):
    setting.put_many(f"n/{number:04}" for number in range(1050))
    assert len(list(origin(setting.name).list("n/"))) == 1050


def test_ranges_are_exact(setting):
    data = setting.put("k", bytes(range(256)) * 40)
    info = listed(setting, "k")
    for start, stop in [(0, 1), (0, len(data)), (len(data) - 1, len(data)), (100, 5000)]:
        assert get(setting, info, start, stop) == data[start:stop]


def test_overwritten_object_never_gives_a_byte(setting):
    setting.put("k", b"old version")
    info = listed(setting, "k")
    setting.put("k", b"new version")
    with pytest.raises(ObjectChangedError, match="overwritten"):
        get(setting, info, 0, 3)


def test_deleted_object(setting):
    setting.put("k", b"data")
    info = listed(setting, "k")
    setting.client.delete_object(Bucket=setting.name, Key="k")
    with pytest.raises((ObjectNotFoundError, ObjectChangedError)):
        get(setting, info, 0, 3)


def test_missing_bucket(setting):
    with pytest.raises(BucketNotFoundError, match="bucket 'no-such-bucket-1' does not exist"):
        list(origin("no-such-bucket-1").list(""))


def test_wrong_secret(setting, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARYSECRET")
    with pytest.raises(AccessDeniedError, match="denied") as caught:
        list(origin(setting.name).list(""))
    assert "CANARY" not in str(caught.value)


def test_no_credentials(setting, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NoCredentialsError, match="AWS_ACCESS_KEY_ID"):
        list(origin(setting.name).list(""))


def test_anonymous_access_to_a_private_bucket_is_denied(setting):
    with pytest.raises(AccessDeniedError):
        list(origin(setting.name, no_sign_request=True).list(""))


def test_refused_endpoint(setting):
    with pytest.raises(EndpointUnreachableError, match="127.0.0.1:9"):
        list(origin(setting.name, endpoint_url="http://127.0.0.1:9").list(""))


def test_unknown_profile(setting):
    with pytest.raises(ConfigError, match="profile 'nobody'"):
        origin(setting.name, profile="nobody")


@pytest.fixture
def renewed(setting, any_store, monkeypatch, tmp_path):
    """An origin made with a refused secret, whose credentials file has been rewritten since."""
    file = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    file.write_text(text.format(any_store.access_key, "expired"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    setting.put("k", b"data")
    made = origin(setting.name)
    made._client_made -= 10
    file.write_text(text.format(any_store.access_key, any_store.secret_key))
    return made


def test_rewritten_credentials_file_needs_no_restart(renewed):
    """A key that has been replaced is read again from the file after the first refusal."""
    assert [info.id.key for info in renewed.list("")] == ["k"]


def test_reads_renew_refused_credentials_too(setting, any_store, monkeypatch, renewed):
    with monkeypatch.context() as good:
        good.setenv("AWS_ACCESS_KEY_ID", any_store.access_key)
        good.setenv("AWS_SECRET_ACCESS_KEY", any_store.secret_key)
        info = listed(setting, "k")
    sink = Collect()
    renewed.read_into(info, ByteRange(0, 4), sink)
    assert bytes(sink.data) == b"data"


@pytest.fixture
def some_credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")


class SteadyStore(Quiet):
    """Answers a range at some 80 MB/s."""

    protocol_version = "HTTP/1.1"
    body = random.Random(6).randbytes(8 * MIB)
    ranges: ClassVar[list[tuple[int, int]]] = []

    def respond(self):
        start, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self.ranges.append((start, last + 1))
        self.send_response(206)
        self.send_header("ETag", '"v"')
        self.send_header("Content-Range", f"bytes {start}-{last}/{len(self.body)}")
        self.send_header("Content-Length", str(last + 1 - start))
        self.end_headers()
        for position in range(start, last + 1, 80_000):
            self.wfile.write(self.body[position : min(position + 80_000, last + 1)])
            time.sleep(0.001)


@pytest.mark.parametrize("tls", [False, True])
def test_a_broken_off_body_goes_on_with_the_right_byte(tls, some_credentials, monkeypatch, tmp_path):
    """What still comes over the old connection is the body or nothing: never ciphertext."""
    certificate = None
    if tls:
        certificate, trusted = make_certificate(tmp_path)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted))

    class Sink(Collect):
        breaks = 0

        def connected(self, abort):
            self.abort = abort
            self.reached = len(self.data)

        def advance(self, count):
            super().advance(count)
            if len(self.data) > self.reached + MIB and self.breaks < 5:
                self.breaks += 1
                self.reached = len(self.data)
                threading.Timer(0.003, self.abort).start()

    SteadyStore.ranges.clear()
    with served(SteadyStore, certificate) as url:
        made = origin("bkt", endpoint_url=url, region="us-east-1", addressing="path")
        info = ObjectInfo(ObjectId(made.name, "key", '"v"'), len(SteadyStore.body), 0)
        sink = Sink(MIB)
        made.read_into(info, ByteRange(0, info.size), sink)
    assert sink.data == SteadyStore.body
    assert sink.breaks == 5
    assert len(SteadyStore.ranges) >= 4
    with pytest.raises(OSError, match="ended"):
        sink.abort()


class ChunkedStore(Quiet):
    """Answers a range with a chunked body, as some proxies do."""

    protocol_version = "HTTP/1.1"
    body = random.Random(5).randbytes(3 * MIB)

    def respond(self):
        self.send_response(206)
        self.send_header("ETag", '"v"')
        self.send_header("Content-Range", f"bytes 0-{len(self.body) - 1}/{len(self.body)}")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(self.body), 100_000):
            piece = self.body[start : start + 100_000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


def test_chunked_body_is_read_without_its_framing(some_credentials):
    with served(ChunkedStore) as url:
        made = origin("bkt", endpoint_url=url, region="us-east-1", addressing="path")
        info = ObjectInfo(ObjectId(made.name, "key", '"v"'), len(ChunkedStore.body), 0)
        for _ in range(2):
            sink = Collect(MIB)
            made.read_into(info, ByteRange(0, info.size), sink)
            assert sink.data == ChunkedStore.body


class BrokenListing(Quiet):
    """Says that there is more and not where."""

    def respond(self):
        self.answer(b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")


def test_a_listing_that_breaks_off_is_an_error(some_credentials):
    with served(BrokenListing) as url:
        made = origin("bkt", endpoint_url=url, region="us-east-1", addressing="path")
        with pytest.raises(OriginError, match="broke off its listing"):
            list(made.list(""))


def published(made, info):
    digest = made.digest(info)
    return (digest.algorithm, digest.value, digest.source) if digest else None


def test_the_etag_of_a_plain_object_is_its_md5(setting):
    data = setting.put("k", b"hello" * 1000)
    assert published(origin(setting.name), listed(setting, "k")) == ("md5", hashlib.md5(data).hexdigest(), "ETag")


def test_an_object_in_parts_has_no_digest_of_the_whole(setting):
    upload = setting.client.create_multipart_upload(Bucket=setting.name, Key="k")["UploadId"]
    parts = []
    for number in (1, 2):
        answer = setting.client.upload_part(
            Bucket=setting.name, Key="k", UploadId=upload, PartNumber=number, Body=bytes(5 * MIB)
        )
        parts.append({"ETag": answer["ETag"], "PartNumber": number})
    setting.client.complete_multipart_upload(
        Bucket=setting.name, Key="k", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    assert published(origin(setting.name), listed(setting, "k")) is None


def test_the_digest_of_an_object_that_has_changed_is_not_given(setting):
    setting.put("k", b"old")
    info = listed(setting, "k")
    setting.put("k", b"new")
    with pytest.raises(ObjectChangedError):
        origin(setting.name).digest(info)


@pytest.mark.parametrize("algorithm", ["sha256", "crc64nvme", "crc32c", "crc32", "sha1"])
def test_a_checksum_kept_by_the_store_is_its_digest(ministack_store, new_bucket, monkeypatch, algorithm):
    for name, value in ministack_store.environment().items():
        monkeypatch.setenv(name, value)
    setting, data = new_bucket(ministack_store), random.Random(1).randbytes(3 * MIB + 5)
    hasher = ALGORITHMS[algorithm]()
    for start in range(0, len(data), 1000_000):
        hasher.update(memoryview(data)[start : start + 1000_000])
    value = base64.b64encode(bytes.fromhex(hasher.hexdigest())).decode()
    setting.client.put_object(Bucket=setting.name, Key="k", Body=data, **{f"Checksum{algorithm.upper()}": value})
    expected = (algorithm, hasher.hexdigest(), "checksum of the store")
    assert published(origin(setting.name), listed(setting, "k")) == expected


def test_etags_without_quotes_are_the_same_ones(monkeypatch):
    """As ``rclone serve s3`` lists them."""

    class Unquoted(Quiet):
        def respond(self):
            if "list-type" in self.path:
                self.answer(
                    b"<ListBucketResult><Contents><Key>k</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    b"<ETag>abc</ETag><Size>4</Size></Contents></ListBucketResult>"
                )
                return
            asked.append(self.headers["If-Match"])
            self.send_response(200)
            for name, value in {"Content-Length": "4", "ETag": '"abc"', "Content-Range": "bytes 0-3/4"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"data")

    asked = []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with served(Unquoted) as url:
        made = origin("bucket", endpoint_url=url)
        info = next(iter(made.list("")))
        sink = Collect()
        made.read_into(info, ByteRange(0, 4), sink)
    assert (bytes(sink.data), asked) == (b"data", ['"abc"'])


def test_version_that_a_versioned_bucket_has_lost(monkeypatch):
    """No server here forgets versions by itself: the store's answer is the documented one."""

    class Forgotten(Quiet):
        def respond(self):
            body = b"<Error><Code>NoSuchVersion</Code><Message>gone</Message></Error>"
            self.send_response(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with served(Forgotten) as url:
        made = origin("bucket", endpoint_url=url, pin_versions=True)
        info = ObjectInfo(ObjectId(made.name, "k", '"abc"?versionId=7'), 4, 0)
        with pytest.raises(ObjectNotFoundError, match="does not exist any more"):
            made.read_into(info, ByteRange(0, 4), Collect())
