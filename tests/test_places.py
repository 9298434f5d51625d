"""What every kind of origin must do, each on its own server; S3 has more tests in ``test_origins``."""

import random
import re
from dataclasses import replace

import pytest

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectInfo
from modelfs.cli.embedded import ObjectStore
from modelfs.config import Config, OriginConfig
from modelfs.errors import AccessDeniedError, ModelfsError, ObjectChangedError, ObjectNotFoundError, OriginError
from modelfs.metrics import Metrics
from modelfs.origins import web
from modelfs.origins.places import make_origin
from modelfs.source import Source, parse_source
from modelfs.sources import Sources
from tests.support.mounting import Mounted
from tests.support.places import PLACES
from tests.support.served import Quiet, served
from tests.test_origins import Collect

NO_STORE = ObjectStore("http://127.0.0.1:1", "none", "none")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.places] if name == "az" else []) for name in PLACES])
def place(request, tmp_path, monkeypatch):
    with PLACES[request.param](tmp_path) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def opened(place, uri=""):
    source = parse_source(uri or place.uri)
    return make_origin(source.place, OriginConfig(), Metrics().origin_counter("s3")), source.prefix


def listed(place) -> dict[str, ObjectInfo]:
    origin, prefix = opened(place)
    return {info.id.key.removeprefix(prefix): info for info in origin.list(prefix)}


def get(origin, info, start, stop):
    sink = Collect(limit=100_000)
    origin.read_into(info, ByteRange(start, stop), sink)
    return bytes(sink.data)


def test_listing(place):
    names = {"a b.bin", "ä/模型.bin", "plus+%25.bin", "deep/er/model-00001-of-00002.safetensors", "empty"}
    for name in names:
        place.put(name, b"" if name == "empty" else name.encode() * 100)
    found = listed(place)
    assert found.keys() == names
    for name, info in found.items():
        assert info.size == (0 if name == "empty" else len(name.encode()) * 100)
        assert info.id.version
        assert info.mtime_ns
    again = listed(place)
    assert {name: info.number for name, info in again.items()} == {name: info.number for name, info in found.items()}


def test_ranges_are_exact(place):
    data = random.Random(5).randbytes(1_500_000)
    place.put("dir/model one.bin", data)
    place.put("small", b"0123456789")
    origin, _ = opened(place)
    infos = listed(place)
    for start, stop in [(0, 1), (0, len(data)), (len(data) - 1, len(data)), (1000, 700_000)]:
        assert get(origin, infos["dir/model one.bin"], start, stop) == data[start:stop]
    assert get(origin, infos["small"], 0, 10) == b"0123456789"
    assert get(origin, infos["small"], 3, 5) == b"34"


def test_overwritten_object_never_gives_a_byte(place):
    place.put("k", b"old version " * 200)
    old = listed(place)["k"]
    place.put("k", b"new version " * 200)
    new = listed(place)["k"]
    assert new.number != old.number
    origin, _ = opened(place)
    assert get(origin, new, 0, 11) == b"new version"
    if place.uri.startswith("hf://"):  # the commit is still there, and with it the old bytes
        assert get(origin, old, 0, 11) == b"old version"
        old = replace(old, locator="")
    with pytest.raises(ObjectChangedError, match="overwritten"):
        get(origin, old, 0, 11)


def test_deleted_object(place):
    place.put("other", b"data")
    place.put("k", b"data")
    info = replace(listed(place)["k"], locator="")
    place.delete("k")
    assert listed(place).keys() == {"other"}
    with pytest.raises((ObjectNotFoundError, ObjectChangedError)):  # Azure looks at the condition first
        get(opened(place)[0], info, 0, 4)


def test_small_objects(place):
    place.put("dir/config.json", b"{}" * 50)
    origin, prefix = opened(place)
    assert origin.get_small(f"{prefix}dir/config.json", 1000) == b"{}" * 50
    assert origin.get_small(f"{prefix}dir/config.json", 10) == b"{}" * 5
    assert origin.get_small(f"{prefix}dir/not.json", 10) is None
    with pytest.raises(OriginError, match="not written to"):
        origin.put_small(f"{prefix}new", b"x")


def test_digests_are_those_of_the_bytes(place):
    data = random.Random(6).randbytes(5000)
    place.put("k", data)
    digest = opened(place)[0].digest(listed(place)["k"])
    if digest is not None:
        from modelfs.digests import ALGORITHMS  # noqa: PLC0415

        hasher = ALGORITHMS[digest.algorithm]()
        hasher.update(data)
        assert hasher.hexdigest() == digest.value
    assert (digest is None) == place.uri.startswith(("file://", "https://"))


def test_what_does_not_exist_is_named(place):
    place.put("k", b"data")
    origin, prefix = opened(place, place.missing)
    with pytest.raises(OriginError, match=r"does not exist|nothing at") as caught:
        list(origin.list(prefix))
    assert caught.value.mend


def test_bad_credentials(place, monkeypatch):
    if not place.wrong:
        return
    place.put("k", b"data")
    info = listed(place)["k"]
    for name, value in place.wrong.items():
        monkeypatch.setenv(name, value)
    origin, prefix = opened(place)
    for ask in (lambda: list(origin.list(prefix)), lambda: get(origin, info, 0, 4)):
        with pytest.raises(AccessDeniedError) as caught:
            ask()
        assert "CANARY" not in str(caught.value)
        assert "set " in str(caught.value)


@pytest.mark.fuse
def test_mounted(place, tmp_path):
    """Through the kernel; with downloads in the worker, and in a process of their own."""
    data = random.Random(7).randbytes(CHUNK_BYTES + 70_000)
    place.put("model/weights.safetensors", data)
    place.put("model/config.json", b"{}")
    processes = "1" if place.uri.startswith("hf:") else "0"
    with Mounted(NO_STORE, [place.uri], tmp_path, "--processes", processes, env=place.environment) as mount:
        assert (mount.path / "model" / "config.json").read_bytes() == b"{}"
        assert (mount.path / "model" / "weights.safetensors").read_bytes() == data
    assert "Traceback" not in mount.log
    assert not re.search("CANARY|sig=|AccountKey", mount.log)


def test_missing_extra_is_one_line(monkeypatch):
    import sys  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    monkeypatch.delitem(sys.modules, "modelfs.origins.gs", raising=False)
    with pytest.raises(ModelfsError, match=r"gs:// needs the Python package gcsfs: pip install 'modelfs\[gs\]'"):
        make_origin("gs://bucket", OriginConfig(), Metrics().origin_counter("s3"))


@pytest.mark.parametrize("validator", [{}, {"ETag": 'W/"weak"'}])
def test_web_server_that_does_not_tell_versions_apart(validator):
    class Bare(Quiet):
        def respond(self):
            if self.path.endswith("/"):
                self.answer(b'<a href="f">f</a><a href="http://[x">odd</a>')
                return
            self.send_response(200)
            for name, value in {"Content-Length": "4", **validator}.items():
                self.send_header(name, value)
            self.end_headers()

        do_HEAD = respond  # noqa: N815

    with served(Bare) as url, pytest.raises(OriginError, match="no version"):
        list(make_origin(url, OriginConfig(), Metrics().origin_counter("http")).list(""))


def test_web_server_that_links_in_circles(monkeypatch):
    class Circles(Quiet):
        def respond(self):
            self.answer(b'<a href="a/">a</a><a href="b/">b</a><a href="../">up</a>')

    monkeypatch.setattr(web, "PAGES", 50)
    with served(Circles) as url, pytest.raises(OriginError, match="more than can be listed"):
        list(make_origin(url, OriginConfig(), Metrics().origin_counter("http")).list(""))


def test_credentials_stay_with_their_host():
    answers = []

    class Elsewhere(Quiet):
        def respond(self):
            answers.append(self.headers.get("Authorization"))
            if self.path == "/first":
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{self.server.server_port}/second")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.answer(b"x")

    with served(Elsewhere) as url:
        origin = make_origin(url, OriginConfig(), Metrics().origin_counter("http"))
        assert origin._text(f"{url}/first", {"Authorization": "Bearer CANARY"}, 10) == b"x"
    assert answers == ["Bearer CANARY", None]


def test_two_revisions_have_listings_of_their_own():
    sources = (Source("o/n", "", "a", "hf", "v1"), Source("o/n", "", "b", "hf", "v2"))
    assert len(set(Sources(Config(sources, "/mnt/x"), Metrics(), None).names())) == 2
