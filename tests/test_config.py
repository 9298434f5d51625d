import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import config, source
from modelfs.errors import ConfigError, MountpointError


def build(sources=("s3://bucket/p",), mountpoint="/mnt/x", flags=None, env=None, path=None):
    return config.build(list(sources), mountpoint, flags or {}, env or {}, path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200GiB", 200 * 2**30), ("1.5TB", 1500 * 10**9), ("4096", 4096), ("10k", 10_000), ("1MiB", 2**20), ("7b", 7)],
)
def test_sizes(text, expected):
    assert config.parse_size(text).of(0) == expected


def test_share_is_of_the_total():
    assert config.parse_size("80%").of(1000) == 800


@pytest.mark.parametrize("text", ["", "GiB", "-1", "12XB", "0%", "101%", "1e3"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="expected|percentage"):
        config.parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("5m", 300), ("1h", 3600), ("500ms", 0.5), ("off", 0)])
def test_durations(text, seconds):
    assert config.parse_seconds(text) == seconds


def test_source_forms():
    assert source.parse_source("s3://bucket") == source.Source("bucket", "")
    assert source.parse_source("llama=s3://bucket/a/b") == source.Source("bucket", "a/b/", "llama")
    assert source.parse_source("gs://bucket/a") == source.Source("bucket", "a/", "", "gs")
    assert source.parse_source("hf://org/name") == source.Source("org/name", "", "", "hf")
    assert source.parse_source("hf://org/name@v1/sub") == source.Source("org/name", "sub/", "", "hf", "v1")
    assert source.parse_source("hf://datasets/o/n@refs/pr/7/x") == source.Source(
        "datasets/o/n", "x/", "", "hf", "refs/pr/7"
    )
    assert source.parse_source("file:///models/llama") == source.Source("", "models/llama/", "", "file")
    assert source.parse_source("https://host:8443/a/b") == source.Source("host:8443", "a/b/", "", "https")


@pytest.mark.parametrize("text", ["hf://org/name@v1/sub", "file:///models/x", "https://[::1]:80/a", "gs://bucket/a"])
def test_source_is_read_back_from_how_it_is_written(text):
    found = source.parse_source(text)
    assert source.parse_source(found.uri) == found
    assert source.parse_source(found.place) == source.Source(found.bucket, "", "", found.scheme, found.revision)


@pytest.mark.parametrize(
    "text",
    ["bucket/x", "ftp://bucket/x", "s3://", "s3://B!/x", "..=s3://bucket/x", "", "hf://name", "hf://o/n@", "file://x",
     "https://", "gs://", "s3://bucket@v1/x"],
)  # fmt: skip
def test_bad_sources_name_themselves(text):
    with pytest.raises(ConfigError) as caught:
        source.parse_source(text)
    assert f"'{text}'" in str(caught.value) or "'..'" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["https://user:CANARY@host/x", "https://host/x?sig=CANARY", "http://a:CANARY@h?CANARY"]
)
def test_secrets_in_sources_are_not_repeated(text):
    with pytest.raises(ConfigError) as caught:
        source.parse_source(text)
    assert "CANARY" not in str(caught.value)


def test_names_that_are_made_are_checked_as_well():
    with pytest.raises(ConfigError, match="cannot be the directory"):
        build(sources=["s3://bucket/a/../", "s3://bucket/c/"])
    assert source.parse_source("file:///data/./models//x") == source.Source("", "data/models/x/", "", "file")


def test_several_sources_get_directories():
    named = build(sources=["s3://bucket/llama/8b/", "q=s3://bucket/qwen"]).sources
    assert [source.name for source in named] == ["8b", "q"]


def test_names_in_the_layout_of_the_hub():
    flags = {"layout": "hf"}
    assert build(sources=["hf://org/n@v1"], flags=flags).sources[0].name == "org/n"
    assert [one.name for one in build(sources=["hf://org/n", "x/y=s3://bucket/z"], flags=flags).sources] == [
        "org/n", "x/y"
    ]  # fmt: skip
    assert build(sources=["s3://bucket/models/"], flags=flags).sources[0].name == ""
    for name in ("a//b", "/a", "a/", "a/../b"):
        with pytest.raises(ConfigError):
            build(sources=[f"{name}=s3://bucket/x"])


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="both be the directory 'x'"):
        build(sources=["s3://bucket/x", "s3://other/x"])


def test_flag_beats_environment_beats_file_beats_default(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('region = "file"\nprofile = "file"\nendpoint_url = "http://file"\n')
    made = build(flags={"region": "flag"}, env={"MODELFS_REGION": "env", "MODELFS_PROFILE": "env"}, path=str(file))
    assert (made.origin.region, made.origin.profile, made.origin.endpoint_url) == ("flag", "env", "http://file")
    assert made.tree.refresh == 300


def test_every_option_can_be_written_in_toml(tmp_path):
    samples = {
        "endpoint_url": '"http://h"', "addressing": '"path"', "cache_size": '"10GiB"', "min_free": '"1%"', "uid": "7",
        "gid": "7", "umask": '"077"', "refresh": '"1m"', "max_memory": '"64MiB"', "prefetch": '"all"', "admin": '"off"',
        "log_level": '"debug"', "log_format": '"json"', "include": '["*.json", "*.gguf"]', "exclude": '["a"]',
        "trace_uri": '"s3://bucket/traces/"', "processes": "2", "read_timeout": '"20s"', "layout": '"hf"',
        "lower_dir": '"/baked"',
        "verify": '"strict"',
        "engine_metrics": '"http://127.0.0.1:8000/metrics"',
    }  # fmt: skip
    unset = '"x"'
    lines = [
        f"{option.name} = {'true' if option.is_switch else samples.get(option.name, unset)}"
        for option in config.options()
    ]
    file = tmp_path / "c.toml"
    file.write_text('sources = ["s3://bucket/p"]\nmountpoint = "/m"\n' + "\n".join(lines))
    made = config.build([], None, {}, {}, str(file))
    assert made.tree.include == ("*.json", "*.gguf")
    assert made.tree.umask == 0o077
    for option in config.options():
        assert getattr(getattr(made, option.section), option.name) != option.default, option.name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("region = \n", "line 1"),
        ('\n\nregoin = "x"\n', "line 3: unknown or malformed key 'regoin': did you mean 'region'?"),
        ('region = "a"\ncache-size = "much"\n', "line 2: bad value 'much'"),
        ("uid = [1]\n", "line 1: uid has the wrong type"),
        ("sources = [1]\n", "line 1: unknown or malformed key 'sources'"),
    ],
)
def test_bad_toml_names_the_line(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(path=str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_any_toml_text_gives_a_configuration_or_one_line(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("t") / "c.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        build(path=str(file))
    except (ConfigError, MountpointError) as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"cache_size": "1MiB"}, "smaller than one chunk"),
        ({"max_memory": "1MiB"}, "fewer than four chunks"),
        ({"engine_metrics": "localhost:8000"}, "a URL such as"),
        ({"engine_metrics": "http://user:word@host/metrics"}, "a URL such as"),
        ({"processes": "17"}, "a number from 0 to 16"),
        ({"read_timeout": "off"}, "at least 1s"),
        ({"endpoint_url": "localhost:9000"}, "not an http"),
        ({"admin": "localhost"}, "IP address and a port"),
        ({"uid": "root"}, "whole number"),
    ],
)
def test_bad_values(flags, words):
    with pytest.raises(ConfigError, match=words):
        build(flags=flags)


def test_mountpoint_with_whitespace_is_refused():
    with pytest.raises(MountpointError, match="space"):
        build(mountpoint="/mnt/a b")


def test_configuration_survives_the_way_to_the_worker():
    made = build(flags={"include": "*.json,x/*", "cache_size": "10GiB", "max_memory": "10%"})
    assert config.Config.from_json(made.to_json()) == made


def test_every_option_has_help_and_a_name_of_its_own():
    names = [option.name for option in config.options()]
    assert len(names) == len(set(names))
    assert all(option.help for option in config.options())
    assert {field.name for field in dataclasses.fields(config.Config)} >= {
        option.section for option in config.options()
    }


def test_sources_as_tables(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("""
        mountpoint = "/mnt/x"
        [[sources]]
        uri = "s3://bucket/llama/"
        name = "llama"
        origin = "hf://org/llama@v1"
        allow_patterns = ["*.json", "*.safetensors"]
        ignore_patterns = "original/"
        [[sources]]
        uri = "hf://org/qwen"
        revision = "refs/pr/1"
    """)
    made = config.build([], None, {}, {}, str(file))
    assert made.sources[0] == source.Source(
        "bucket", "llama/", "llama", include=("*.json", "*.safetensors"), exclude=("original/",),
        origin="hf://org/llama@v1/",
    )  # fmt: skip
    assert made.sources[1] == source.Source("org/qwen", "", "qwen", "hf", "refs/pr/1")
    assert config.Config.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('uri = "s3://b/x"\nrevison = "v"', "did you mean 'revision'"),
        ('uri = "s3://bucket/x"\nrevision = "v"', "has no revisions"),
        ('name = "x"', "without uri"),
        ('uri = "s3://bucket/x"\norigin = "s3://bucket/y"', "second place"),
        ('uri = "s3://bucket/x"\ninclude = 3', "'include' has the wrong type"),
        ('uri = "s3://bucket/x"\nname = ".."', "cannot be the name"),
        ('uri = "hf://org/name"\nrevision = "a b"', "write hf://"),
        ('uri = "hf://org/name"\nrevision = "a/b"', "is no revision"),
    ],
)
def test_bad_source_tables_name_themselves(tmp_path, lines, message):
    file = tmp_path / "c.toml"
    file.write_text(f"[[sources]]\n{lines}\n")
    with pytest.raises(ConfigError, match=message):
        config.build([], "/mnt/x", {}, {}, str(file))
