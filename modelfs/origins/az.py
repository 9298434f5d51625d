"""Azure Blob Storage, through its SDK: its listings and credentials, plain ranged GETs for bytes.

A version is the ETag, and every GET carries it as ``If-Match``. The account comes from
AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME; credentials are the connection string's,
AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, else Azure's default chain (environment, workload identity, managed
identity, az login). GETs carry a bearer token, or the query string of a shared access signature, made here of a key and
renewed before it ends. Threads: any.
"""

import datetime as dt
import os
import time
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any
from urllib.parse import quote, urlsplit

from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError, ServiceRequestError
from azure.identity import CredentialUnavailableError, DefaultAzureCredential
from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import Digest
from modelfs.errors import (
    BucketNotFoundError,
    ConfigError,
    EndpointUnreachableError,
    NoCredentialsError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    TransientOriginError,
)
from modelfs.origins import Count
from modelfs.origins.body import quoted
from modelfs.origins.web import HttpOrigin, StatusError
from modelfs.source import Source

_MEND = "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and log in (az login, or an identity)"
_SCOPE = "https://storage.azure.com/.default"
_VERSION = "2021-08-06"
"""Of the service's interface; one that knows bearer tokens and ``If-Match``."""
_SIGNATURE_SECONDS = 3600.0
_CONNECT_SECONDS, _READ_SECONDS = 5, 10


class AzOrigin(HttpOrigin):
    """One container.

    Raises:
        ConfigError: No account is named.
    """

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        super().__init__(count, _MEND)
        self._container = source.bucket
        self._lock = Lock()
        self._signature = os.environ.get("AZURE_STORAGE_SAS_TOKEN", "").removeprefix("?")
        self._signed_until = float("inf") if self._signature else 0.0
        self._credential: Any = None
        self._service = self._connect(config)
        self._signature = urlsplit(str(self._service.url)).query or self._signature  # a connection string's
        self.name = f"az://{self._service.account_name}/{source.bucket}"

    def _connect(self, config: OriginConfig) -> BlobServiceClient:
        settings: dict[str, Any] = {
            "retry_total": 0,
            "connection_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
        }
        text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
        try:
            if text:
                return BlobServiceClient.from_connection_string(text, **settings)
        except ValueError:
            raise ConfigError(
                "AZURE_STORAGE_CONNECTION_STRING cannot be used", "copy it from the portal again"
            ) from None
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or os.environ.get("AZURE_STORAGE_ACCOUNT")
        if not account:
            raise ConfigError(f"no Azure account for az://{self._container}", _MEND)
        key = os.environ.get("AZURE_STORAGE_ACCOUNT_KEY") or os.environ.get("AZURE_STORAGE_KEY")
        url = f"https://{account}.blob.core.windows.net"
        if key or self._signature or config.no_sign_request:
            given: Any = {"account_name": account, "account_key": key} if key else self._signature or None
            return BlobServiceClient(url, credential=given, **settings)
        self._credential = DefaultAzureCredential()
        return BlobServiceClient(url, credential=self._credential, **settings)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every blob under ``prefix``; see ``Origin.list``."""

        def ask(_: object) -> list[Any]:
            self._count("requests", "list", 1)
            container = self._service.get_container_client(self._container)
            return list(container.list_blobs(name_starts_with=prefix, include=["metadata"]))

        for blob in self._persist(ask, prefix):
            if not (blob.metadata or {}).get("hdi_isfolder"):  # of a hierarchical account
                seconds = int(blob.last_modified.timestamp())
                yield ObjectInfo(ObjectId(self.name, blob.name, quoted(blob.etag)), blob.size, seconds * 10**9)

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""
        try:
            return self._persist(lambda _: self._text(self._url(key), self._headers(), limit), key)
        except ObjectNotFoundError:
            return None

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: the MD5 that whoever uploaded the blob gave, if any."""

        def ask(_: object) -> Any:  # noqa: ANN401
            self._count("requests", "head", 1)
            return self._service.get_blob_client(self._container, info.id.key).get_blob_properties()

        found = self._persist(ask, info.id.key)
        if quoted(found.etag) != info.id.version:
            raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")
        value = found.content_settings.content_md5
        return Digest("md5", bytes(value).hex(), "checksum of the store") if value else None

    # -- reading ------------------------------------------------------------------------------------

    def _address(self, info: ObjectInfo) -> tuple[str, dict[str, str]]:
        return self._url(info.id.key), {**self._headers(), "If-Match": info.id.version}

    def _url(self, key: str) -> str:
        url = f"{self._service.primary_endpoint.partition('?')[0].rstrip('/')}/{self._container}/{quote(key)}"
        signature = self._sign()
        return f"{url}?{signature}" if signature else url

    def _headers(self) -> dict[str, str]:
        headers = {"x-ms-version": _VERSION}
        if self._credential is not None:
            headers["Authorization"] = f"Bearer {self._credential.get_token(_SCOPE).token}"
        return headers

    def _sign(self) -> str:
        """Return the query string that lets a GET through, made of the account's key if there is one."""
        key = getattr(self._service.credential, "account_key", None)
        if key is None:
            return self._signature
        with self._lock:
            if time.time() > self._signed_until - _SIGNATURE_SECONDS / 2:
                self._signed_until = time.time() + _SIGNATURE_SECONDS
                self._signature = generate_container_sas(
                    account_name=str(self._service.account_name),
                    container_name=self._container,
                    account_key=key,
                    permission=ContainerSasPermissions(read=True),
                    expiry=dt.datetime.fromtimestamp(self._signed_until, dt.UTC),
                )
            return self._signature

    def _check_version(self, info: ObjectInfo, headers: Mapping[str, str]) -> None:
        if headers.get("ETag") not in {None, info.id.version}:
            raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")

    def _where(self, key: str) -> str:
        return f"az://{self._container}/{key}"

    def _translate(self, error: Exception, key: str) -> OriginError:
        if isinstance(error, HttpResponseError) and getattr(error, "error_code", "") == "ContainerNotFound":
            return BucketNotFoundError(
                f"container '{self._container}' does not exist", "check its name and the account"
            )
        if isinstance(error, CredentialUnavailableError | ClientAuthenticationError) and not error.status_code:
            return NoCredentialsError(f"no usable Azure credentials for container '{self._container}'", _MEND)
        if isinstance(error, HttpResponseError):
            return super()._translate(StatusError(error.status_code or 500, "", {}), key)
        if isinstance(error, ServiceRequestError):
            return EndpointUnreachableError(
                f"cannot connect to the account of container '{self._container}'", "check its name and the network"
            )
        if isinstance(error, AzureError):
            return TransientOriginError(f"the connection broke while listing {self._where(key)}")
        return super()._translate(error, key)
