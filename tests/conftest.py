"""Servers, buckets and mounts for the tests; everything on loopback, everything stopped by pid."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config as SdkConfig

from modelfs.cli.embedded import ObjectStore, ministack
from modelfs.fuse.supervisor import unmount
from modelfs.fuse.tuning import mounts
from tests.support.mounting import Mounted
from tests.support.rgw import Rgw, rgw


def client_of(store: ObjectStore) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name="us-east-1",
        config=SdkConfig(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
    )


@pytest.fixture(scope="session", autouse=True)
def no_mount_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    base = str(tmp_path_factory.getbasetemp())
    for mount in mounts():
        if mount.mountpoint.startswith(base):
            unmount(mount.mountpoint, lazy=True)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the developer's credentials or configuration."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


@pytest.fixture(scope="session")
def rgw_server() -> Iterator[Rgw]:
    with rgw() as server:
        yield server


@pytest.fixture(scope="session")
def ministack_store() -> Iterator[ObjectStore]:
    """ministack with a user whose signatures it checks (it does not check the root key's)."""
    with ministack() as root:
        iam = boto3.client(
            "iam", endpoint_url=root.endpoint_url, aws_access_key_id=root.access_key,
            aws_secret_access_key=root.secret_key, region_name="us-east-1",
        )  # fmt: skip
        iam.create_user(UserName="test")
        allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        iam.put_user_policy(UserName="test", PolicyName="all", PolicyDocument=json.dumps(allow))
        key = iam.create_access_key(UserName="test")["AccessKey"]
        iam.close()
        yield ObjectStore(root.endpoint_url, key["AccessKeyId"], key["SecretAccessKey"])


@pytest.fixture(params=["rgw", "ministack"])
def any_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each test runs on both servers."""
    if request.param == "rgw":
        return request.getfixturevalue("rgw_server").store
    return request.getfixturevalue("ministack_store")


@pytest.fixture
def store(rgw_server: Rgw) -> ObjectStore:
    """The real server."""
    return rgw_server.store


class Bucket:
    """A fresh bucket."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.client = client_of(store)
        self.client.create_bucket(Bucket=self.name)

    def put(self, key: str, data: bytes) -> bytes:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)
        return data

    def put_many(self, keys: Iterable[str]) -> None:
        """Put empty objects, many at a time."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: self.put(key, b""), keys))

    def uri(self, prefix: str = "") -> str:
        return f"s3://{self.name}/{prefix}"


@pytest.fixture
def new_bucket() -> Iterator[Callable[[ObjectStore], Bucket]]:
    made: list[Bucket] = []

    def make(store: ObjectStore) -> Bucket:
        made.append(Bucket(store))
        return made[-1]

    yield make
    for bucket in made:
        bucket.client.close()


@pytest.fixture
def bucket(store: ObjectStore, new_bucket: Callable[[ObjectStore], Bucket]) -> Bucket:
    return new_bucket(store)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Mount sources of a bucket; everything is unmounted at the end."""
    made: list[Mounted] = []

    def mount(
        bucket: Bucket,
        *options: str,
        prefix: str = "",
        sources: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> Mounted:
        made.append(Mounted(bucket.store, sources or [bucket.uri(prefix)], tmp_path, *options, env=env))
        return made[-1].__enter__()

    yield mount
    for one in made:
        one.stop()
