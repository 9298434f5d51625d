"""Bad input gets one clear line and its exit status; never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import botocore.exceptions
import pytest

from modelfs import errors
from modelfs.config import OriginConfig
from modelfs.metrics import Metrics
from modelfs.origins.s3 import S3Origin
from modelfs.source import Source
from tests.support.mounting import run


def small(tmp_path):
    return ["--cache-dir", str(tmp_path / "cache"), "--cache-size", "1GiB", "--min-free", "1MiB", "--admin", "off"]


def attempt(tmp_path, source, *options, env=None, mountpoint=None):
    point = tmp_path / "mnt"
    point.mkdir(exist_ok=True)
    done = run("mount", source, mountpoint or str(point), *small(tmp_path), *options, env={**os.environ, **(env or {})})
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("modelfs: ")
    return done.returncode, lines[0]


@pytest.mark.parametrize("background", [False, True])
def test_missing_bucket(store, tmp_path, background):
    options = ["--background"] if background else []
    code, line = attempt(tmp_path, "s3://no-such-bucket-xyz/p", *options, env=store.environment())
    assert (code, "bucket 'no-such-bucket-xyz' does not exist" in line) == (3, True)


def test_empty_prefix(bucket, tmp_path):
    code, line = attempt(tmp_path, bucket.uri("nothing/"), env=bucket.store.environment())
    assert (code, f"there is no object under {bucket.uri('nothing/')}" in line) == (3, True)


def test_denied_and_no_secret_in_the_line(bucket, tmp_path):
    env = {**bucket.store.environment(), "AWS_SECRET_ACCESS_KEY": "CANARYSECRET"}
    code, line = attempt(tmp_path, bucket.uri(), env=env)
    assert (code, "denied" in line, "CANARY" in line) == (4, True, False)


def test_no_credentials(bucket, tmp_path):
    code, line = attempt(tmp_path, bucket.uri(), env={"AWS_ENDPOINT_URL": bucket.store.endpoint_url})
    assert (code, "no usable AWS credentials" in line) == (4, True)


def test_refused_endpoint(bucket, tmp_path):
    code, line = attempt(tmp_path, bucket.uri(), "--endpoint-url", "http://127.0.0.1:9", env=bucket.store.environment())
    assert (code, "cannot connect to http://127.0.0.1:9" in line) == (5, True)


def test_mountpoint_missing_not_empty_not_a_directory(bucket, tmp_path):
    env = bucket.store.environment()
    code, line = attempt(tmp_path, bucket.uri(), env=env, mountpoint=str(tmp_path / "none"))
    assert (code, "does not exist" in line) == (6, True)
    (tmp_path / "mnt" / "file").write_text("x")
    code, line = attempt(tmp_path, bucket.uri(), env=env)
    assert (code, "is not empty" in line) == (6, True)
    code, line = attempt(tmp_path, bucket.uri(), env=env, mountpoint=str(tmp_path / "mnt" / "file"))
    assert (code, "is not a directory" in line) == (6, True)
    code, line = attempt(tmp_path, bucket.uri(), env=env, mountpoint=str(tmp_path / "a b"))
    assert (code, "space" in line) == (6, True)


@pytest.mark.fuse
def test_mountpoint_busy_and_cache_held(bucket, mounted, tmp_path):
    bucket.put("f", b"x")
    mount = mounted(bucket)
    env = bucket.store.environment()
    code, line = attempt(tmp_path, bucket.uri(), env=env)
    assert (code, "is already a modelfs mount" in line) == (6, True)
    (tmp_path / "second").mkdir()
    code, line = attempt(tmp_path, bucket.uri(), env=env, mountpoint=str(tmp_path / "second"))
    assert (code, f"in use by pid {mount.worker_pid()}" in line) == (8, True)


def test_cache_directory_not_writable(bucket, tmp_path):
    (tmp_path / "plain").write_text("x")
    code, line = attempt(
        tmp_path, bucket.uri(), "--cache-dir", str(tmp_path / "plain" / "c"), env=bucket.store.environment()
    )
    assert (code, "cannot be used" in line) == (8, True)


def test_cache_smaller_than_a_chunk(bucket, tmp_path):
    code, line = attempt(tmp_path, bucket.uri(), "--cache-size", "1MiB")
    assert (code, "smaller than one chunk" in line) == (2, True)
    code, line = attempt(tmp_path, bucket.uri(), "--cache-size", "0.000001%", env=bucket.store.environment())
    assert (code, "less than one chunk" in line) == (8, True)


def test_bad_option_value_toml_and_environment(tmp_path):
    code, line = attempt(tmp_path, "s3://bucket/p", "--refresh", "often")
    assert (code, "--refresh: bad value 'often'" in line) == (2, True)
    (tmp_path / "c.toml").write_text('region = "x"\ncache_size = 3 TB\n')
    code, line = attempt(tmp_path, "s3://bucket/p", "--config", str(tmp_path / "c.toml"))
    assert (code, "line 2" in line) == (2, True)
    code, line = attempt(tmp_path, "s3://bucket/p", env={"MODELFS_UMASK": "999"})
    assert (code, "environment variable MODELFS_UMASK: bad value '999'" in line) == (2, True)
    code, line = attempt(tmp_path, "ftp://bucket/p")
    assert (code, "unknown scheme ftp://" in line) == (2, True)


def test_unknown_option_is_a_usage_error():
    done = run("mount", "s3://bucket/p", "/x", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_missing_fuse_device(tmp_path):
    """With an empty /dev, as in a container without --device /dev/fuse."""
    (tmp_path / "mnt").mkdir()
    script = f"mount -t tmpfs none /dev && {sys.executable} -m modelfs mount s3://bucket/p {tmp_path / 'mnt'}"
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, "/dev/fuse is missing" in done.stderr) == (7, True), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wrong_region(tmp_path):
    """No server here has regions: the store's answer is the recorded one."""
    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "x"
    try:
        origin = S3Origin(source=Source("bucket", ""), config=OriginConfig(), count=Metrics().origin_counter("s3"))
    finally:
        del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    answer = {
        "Error": {"Code": "AuthorizationHeaderMalformed", "Message": "wrong", "Region": "eu-west-1"},
        "ResponseMetadata": {"HTTPStatusCode": 400, "HTTPHeaders": {}},
    }
    error = origin._translate(botocore.exceptions.ClientError(answer, "ListObjectsV2"), "k")
    assert isinstance(error, errors.WrongRegionError)
    assert str(error) == "bucket 'bucket' is in another region: set --region eu-west-1"
    assert error.exit_code == 4


def test_commands_without_a_mount(tmp_path):
    for command in (["umount", str(tmp_path)], ["warm", str(tmp_path)], ["status", str(tmp_path)]):
        done = run(*command)
        assert (done.returncode, len(done.stderr.splitlines())) == (6, 1), done.stderr
    assert run("wait", str(tmp_path), "--timeout", "100ms").returncode == 9
    assert run("wait", str(tmp_path), "--timeout", "soon").returncode == 2


def test_doctor_says_what_to_do(bucket, tmp_path):
    bucket.put("f", b"data")
    env = {**os.environ, **bucket.store.environment()}
    good = run("doctor", bucket.uri(), "--cache-dir", str(tmp_path / "c"), env=env)
    assert good.returncode == 0, good.stdout
    assert "credentials can list" in good.stdout
    bad = run("doctor", "s3://no-such-bucket-xyz/", "--cache-dir", str(tmp_path / "c"), env=env)
    assert (bad.returncode, "FAIL  bucket 'no-such-bucket-xyz' does not exist" in bad.stdout) == (1, True)


def test_exit_codes_are_the_documented_classes():
    def below(kind):
        yield kind
        for sub in kind.__subclasses__():
            yield from below(sub)

    codes = {kind.__name__: kind.exit_code for kind in below(errors.ModelfsError)}
    assert set(codes.values()) == set(range(1, 11))
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for code in sorted(set(codes.values())):
        assert f"| {code} |" in readme, code
