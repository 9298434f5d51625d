"""Google Cloud Storage, through gcsfs: its listings and credentials, plain ranged GETs for bytes.

A version is the object's generation, and every GET names it. Credentials are Google's application default ones, as
gcsfs finds them; STORAGE_EMULATOR_HOST is honoured. Threads: any.
"""

import datetime as dt
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError
from google.auth.exceptions import GoogleAuthError, TransportError

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import Digest, from_base64
from modelfs.errors import (
    BucketNotFoundError,
    EndpointUnreachableError,
    NoCredentialsError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    TransientOriginError,
)
from modelfs.origins import Count
from modelfs.origins.web import HttpOrigin, StatusError
from modelfs.source import Source

ANSWER_SECONDS = 30.0
_MEND = "log in with gcloud, set GOOGLE_APPLICATION_CREDENTIALS, or use --no-sign-request for public buckets"


class GsOrigin(HttpOrigin):
    """One bucket."""

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        super().__init__(count, _MEND)
        self._bucket = source.bucket
        self._anonymous = config.no_sign_request
        self._system: Any = None
        self._mute = False
        self.name = source.place

    def _files(self) -> Any:  # noqa: ANN401
        """Return gcsfs's file system; looking for credentials may take a while."""
        if self._system is None:
            self._system = GCSFileSystem(
                token="anon" if self._anonymous else None,
                requests_timeout=ANSWER_SECONDS,
                use_listings_cache=False,
                skip_instance_cache=True,
            )
        return self._system

    def _renew(self, refused: Any) -> bool:  # noqa: ANN401
        """Look for credentials anew: what was found may have been none, as before the node's identity is there."""
        self._system = None
        return not self._anonymous

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object under ``prefix``; see ``Origin.list``."""
        path = f"{self._bucket}/{prefix}".rstrip("/")

        def ask(_: object) -> dict[str, dict[str, Any]]:
            self._count("requests", "list", 1)
            found: dict[str, dict[str, Any]] = self._files().find(path, detail=True, update_cache=False)
            return found

        for name, item in self._persist(ask, prefix).items():
            key = name.removeprefix(f"{self._bucket}/")
            if key.startswith(prefix):
                seconds = dt.datetime.fromisoformat(str(item["updated"])).timestamp()
                yield ObjectInfo(
                    ObjectId(self.name, key, str(item["generation"])), int(item["size"]), int(seconds) * 10**9
                )

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""

        def ask(_: object) -> bytes:
            return self._text(self._files().url(f"{self._bucket}/{key}"), self._headers(), limit)

        try:
            return self._persist(ask, key)
        except ObjectNotFoundError:
            return None

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: MD5 where the store has it (not of composed objects), else CRC32C."""

        def ask(_: object) -> dict[str, Any]:
            self._count("requests", "head", 1)
            found: dict[str, Any] = self._files().info(f"{self._bucket}/{info.id.key}")
            return found

        item = self._persist(ask, info.id.key)
        self._compare(info, item.get("generation"))
        for algorithm, name in (("md5", "md5Hash"), ("crc32c", "crc32c")):
            value = from_base64(str(item.get(name) or ""))
            if value:
                return Digest(algorithm, value, "checksum of the store")
        return None

    def _address(self, info: ObjectInfo) -> tuple[str, dict[str, str]]:
        if self._mute:  # an emulator, which may not look at the generation asked for either
            self._compare(info, self._files().info(f"{self._bucket}/{info.id.key}").get("generation"))
        url = self._files().url(f"{self._bucket}/{info.id.key}", generation=info.id.version)
        # What is stored compressed comes as it is stored: its size is that of the listing.
        return url, {**self._headers(), "Accept-Encoding": "gzip"}

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        self._files().credentials.apply(headers)
        return headers

    def _check_version(self, info: ObjectInfo, headers: Mapping[str, str]) -> None:
        found = headers.get("X-Goog-Generation")
        if found is not None:
            self._compare(info, found)
        elif not self._mute:
            self._mute = True
            raise TransientOriginError(f"the store does not say the generation of {self._where(info.id.key)}")

    def _compare(self, info: ObjectInfo, generation: object) -> None:
        if str(generation) != info.id.version:
            raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")

    def _where(self, key: str) -> str:
        return f"gs://{self._bucket}/{key}"

    def _translate(self, error: Exception, key: str) -> OriginError:
        if isinstance(error, TransportError) or (isinstance(error, GoogleAuthError) and error.retryable):
            return TransientOriginError(f"Google's credentials cannot be renewed for bucket '{self._bucket}' now")
        if isinstance(error, OSError) and str(error).startswith("Forbidden"):
            return super()._translate(StatusError(403, "", {}), key)
        if isinstance(error, GoogleAuthError):
            return NoCredentialsError(f"no usable Google credentials for bucket '{self._bucket}'", _MEND)
        if isinstance(error, FileNotFoundError):
            return BucketNotFoundError(f"there is nothing at {self._where(key)}", "check the bucket and the prefix")
        if isinstance(error, aiohttp.ClientConnectorError):
            return EndpointUnreachableError(f"cannot connect for bucket '{self._bucket}'", "check the network")
        if isinstance(error, aiohttp.ClientError):
            return TransientOriginError(f"the connection broke while listing {self._where(key)}")
        if isinstance(error, HttpError):
            return super()._translate(StatusError(int(error.code or 500), "", {}), key)
        if isinstance(error, StatusError) and error.status == 404 and "generation=" in error.url:
            return self._gone(key)
        return super()._translate(error, key)

    def _gone(self, key: str) -> OriginError:
        """Tell an overwritten object from a deleted one."""
        try:
            self._files().info(f"{self._bucket}/{key}")
        except FileNotFoundError:
            return ObjectNotFoundError(f"{self._where(key)} does not exist any more", "check the bucket")
        except Exception as error:  # noqa: BLE001 - the question will be asked again
            return TransientOriginError(f"{self._where(key)} cannot be asked for ({type(error).__name__})")
        return ObjectChangedError(f"{self._where(key)} was overwritten", "open it again to read the new version")
