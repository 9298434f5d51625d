"""S3 and everything that speaks it, through boto3.

Every GET carries ``If-Match`` of the version that was listed, and the answer's status, ETag,
Content-Range and length are checked before the first byte is taken: some stores answer 200 to a ranged
GET or ignore If-Match. Credentials come from the SDK's chain, which refreshes expiring ones; when a
token has expired all the same, the session is built anew once, so that rewritten files are read.

Threads: one client is shared by all; botocore clients are thread-safe.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions as sdk
from botocore import UNSIGNED
from botocore.config import Config as SdkConfig

from modelfs.chunks import ByteRange, ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import ALGORITHMS, ETAG, Digest, from_base64
from modelfs.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    EndpointUnreachableError,
    NoCredentialsError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    ThrottledError,
    TransientOriginError,
    WrongRegionError,
)
from modelfs.origins import Count, Sink
from modelfs.origins.body import BROKEN, CONNECT_SECONDS, INACTIVITY_SECONDS, MAX_CONNECTIONS, check_range, quoted
from modelfs.origins.retry import RetryingOrigin
from modelfs.source import Source

log = logging.getLogger(__name__)

_VERSION_ID = "?versionId="
"""In a version, between the ETag and the id that a versioned bucket gave it."""
_RENEW_SECONDS = 1.0
"""Least age of a session before it is built anew because its credentials were refused."""

_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "AccountProblem"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_THROTTLED = {"SlowDown", "TooManyRequests", "Throttling", "ThrottlingException", "RequestLimitExceeded", "429", "503"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_CHANGED = {"PreconditionFailed", "412"}


class S3Origin(RetryingOrigin):
    """One bucket at one endpoint.

    Args:
        source: Names the bucket.
        config: Endpoint, region, profile, addressing.
        count: Takes counts.
    """

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        bucket = self._bucket = source.bucket
        self._config = config
        self._lock = threading.Lock()
        self._client_made = 0.0
        super().__init__(count, self._make_client())
        self._endpoint = str(self._client.meta.endpoint_url)
        custom = (
            "" if re.fullmatch(r"https://s3[.\w-]*\.amazonaws\.com(\.cn)?", self._endpoint) else f"@{self._endpoint}"
        )
        self.name = f"s3://{bucket}{custom}"

    def _make_client(self) -> Any:  # noqa: ANN401
        origin = self._config
        try:
            session = boto3.Session(profile_name=origin.profile or None, region_name=origin.region or None)
            settings = SdkConfig(
                signature_version=UNSIGNED if origin.no_sign_request else None,
                connect_timeout=CONNECT_SECONDS,
                read_timeout=INACTIVITY_SECONDS,
                max_pool_connections=MAX_CONNECTIONS,
                # Retried here, where progress is known.
                retries={"total_max_attempts": 1, "mode": "standard"},
                s3={"addressing_style": origin.addressing},
                # A checksum of the whole object cannot check a range, and older stores reject the trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                user_agent_extra="modelfs",
            )
            client = session.client(
                "s3",
                endpoint_url=origin.endpoint_url or None,
                region_name=session.region_name or "us-east-1",
                config=settings,
            )
        except sdk.ProfileNotFound as error:
            raise ConfigError(
                f"AWS profile '{origin.profile}' does not exist", "check --profile and ~/.aws/config"
            ) from error
        except (sdk.BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"the AWS configuration cannot be used ({_plain(error)})", "check AWS_* and ~/.aws/config"
            ) from error
        self._client_made = time.monotonic()
        return client

    # -- listing ------------------------------------------------------------------------------------

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object under ``prefix``; see ``Origin.list``. Of a versioned one, its newest version."""
        versions = self._config.pin_versions
        operation, entries = ("list_object_versions", "Versions") if versions else ("list_objects_v2", "Contents")
        continues = (
            {"KeyMarker": "NextKeyMarker", "VersionIdMarker": "NextVersionIdMarker"}
            if versions
            else {"ContinuationToken": "NextContinuationToken"}
        )
        markers: dict[str, str] = {}
        while True:
            arguments = {"Bucket": self._bucket, "Prefix": prefix, **markers}

            def ask(client: Any, arguments: dict[str, str] = arguments) -> dict[str, Any]:  # noqa: ANN401
                self._count("requests", "list", 1)
                page: dict[str, Any] = getattr(client, operation)(**arguments)
                return page

            page = self._persist(ask, prefix)
            yield from (self._info(item) for item in page.get(entries, ()) if item.get("IsLatest", True))
            if not page.get("IsTruncated"):
                return
            markers = {name: page[following] for name, following in continues.items() if page.get(following)}
            if not markers:
                raise OriginError(f"bucket '{self._bucket}': the store broke off its listing", "check --endpoint-url")

    def _info(self, item: dict[str, Any]) -> ObjectInfo:
        version = quoted(str(item["ETag"]))
        if item.get("VersionId", "null") != "null":  # null: put before the bucket kept versions
            version += f"{_VERSION_ID}{item['VersionId']}"
        seconds = int(item["LastModified"].timestamp())
        return ObjectInfo(ObjectId(self.name, item["Key"], version), int(item["Size"]), seconds * 10**9)

    def _renew(self, refused: Any) -> bool:  # noqa: ANN401
        """Build a fresh session in place of the ``refused`` client; return whether trying again makes sense."""
        with self._lock:
            if self._client is not refused:
                return True  # another thread has done it
            if time.monotonic() - self._client_made < _RENEW_SECONDS:
                return False
            try:
                client = self._make_client()
            except ConfigError as error:
                log.warning("the credentials cannot be read again: %s", error)
                return False
            if client.meta.endpoint_url != self._endpoint:
                log.warning("the configuration names another endpoint now: mount again to use it")
                return False
            self._client = client
        return True

    # -- small objects of our own -------------------------------------------------------------------

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""

        def ask(client: Any) -> dict[str, Any]:  # noqa: ANN401
            self._count("requests", "get", 1)
            with client.get_object(Bucket=self._bucket, Key=key)["Body"] as body:
                return {"data": body.read(limit)}

        try:
            data: bytes = self._persist(ask, key)["data"]
        except ObjectNotFoundError:
            return None
        return data

    def put_small(self, key: str, data: bytes) -> None:
        """See ``Origin.put_small``."""

        def ask(client: Any) -> dict[str, Any]:  # noqa: ANN401
            self._count("requests", "put", 1)
            answer: dict[str, Any] = client.put_object(Bucket=self._bucket, Key=key, Body=data)
            return answer

        self._persist(ask, key)

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: a checksum attribute of the whole object, or an ETag that is its MD5."""

        def ask(client: Any) -> dict[str, Any]:  # noqa: ANN401
            self._count("requests", "head", 1)
            answer: dict[str, Any] = client.head_object(
                Bucket=self._bucket, Key=info.id.key, ChecksumMode="ENABLED", **_pinned(info)
            )
            return answer

        answer = self._persist(ask, info.id.key)
        if quoted(answer.get("ETag", "")) != etag_of(info):
            raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")
        for algorithm in ALGORITHMS:
            # Of an object uploaded in parts there may be a sum over the parts' sums instead: it ends in their number.
            value = from_base64(answer.get(f"Checksum{algorithm.upper()}") or "")
            if value and answer.get("ChecksumType") != "COMPOSITE":
                return Digest(algorithm, value, "checksum of the store")
        encrypted = answer.get("SSECustomerAlgorithm") or "kms" in answer.get("ServerSideEncryption", "")
        tag = etag_of(info).strip('"')
        if re.fullmatch("[0-9a-f]{32}", tag) and not encrypted:
            return Digest("md5", tag, ETAG)
        return None

    # -- reading ------------------------------------------------------------------------------------

    def _stream(self, client: Any, info: ObjectInfo, span: ByteRange, sink: Sink) -> Iterator[int]:  # noqa: ANN401
        """Yield the number of bytes received at a time; ends early when the body does."""
        self._count("requests", "get", 1)
        answer = client.get_object(
            Bucket=self._bucket, Key=info.id.key, Range=f"bytes={span.start}-{span.stop - 1}", **_pinned(info)
        )
        yield from self._receive(answer["Body"]._raw_stream, len(span), sink, lambda: self._check(answer, info, span))

    def _check(self, answer: dict[str, Any], info: ObjectInfo, span: ByteRange) -> None:
        """Make sure the answer is the range and the version asked for."""
        where = self._where(info.id.key)
        if "ETag" in answer and quoted(answer["ETag"]) != etag_of(info):
            raise ObjectChangedError(f"{where} was overwritten", "open it again to read the new version")
        check_range(where, span, info.size, answer.get("ContentRange"), answer.get("ContentLength"))

    # -- errors -------------------------------------------------------------------------------------

    def _where(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"

    def _translate(self, error: Exception, key: str) -> OriginError:
        """Turn a library exception into a domain error; what is no network matter is raised again."""
        if isinstance(error, OriginError):
            return error
        if isinstance(error, sdk.ClientError):
            return self._translate_answer(error, key)
        if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError | sdk.CredentialRetrievalError):
            return NoCredentialsError(
                f"no usable AWS credentials for bucket '{self._bucket}'",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, --profile, a role, or --no-sign-request",
            )
        if isinstance(error, sdk.TokenRetrievalError | sdk.SSOError):
            return NoCredentialsError(f"the AWS login for bucket '{self._bucket}' has expired", "log in again")
        if isinstance(
            error, sdk.EndpointConnectionError | sdk.ConnectTimeoutError | sdk.SSLError | sdk.ProxyConnectionError
        ):
            return EndpointUnreachableError(
                f"cannot connect to {self._endpoint} for bucket '{self._bucket}'",
                "check --endpoint-url and the network",
            )
        if isinstance(error, (sdk.HTTPClientError, *BROKEN)):
            return TransientOriginError(f"the connection to {self._endpoint} broke while reading {self._where(key)}")
        if isinstance(error, sdk.BotoCoreError):
            return OriginError(f"the request for {self._where(key)} could not be made ({_plain(error)})")
        raise error

    def _translate_answer(self, error: Any, key: str) -> OriginError:  # noqa: ANN401
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        where, at = self._where(key), f"at {self._endpoint}"
        if code == "NoSuchBucket":
            return BucketNotFoundError(
                f"bucket '{self._bucket}' does not exist {at}", "check the name and --endpoint-url"
            )
        if code in _CHANGED or status == 412:
            return ObjectChangedError(f"{where} was overwritten", "open it again to read the new version")
        if code in {"NoSuchKey", "NoSuchVersion", "NotFound", "404"}:
            return ObjectNotFoundError(f"{where} does not exist any more", "check the bucket")
        if code in _REGION or status == 301:
            hint = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
            hint = hint or error.response.get("Error", {}).get("Region")
            return WrongRegionError(
                f"bucket '{self._bucket}' is in another region", f"set --region{' ' + hint if hint else ''}"
            )
        if code in _EXPIRED:
            return AccessDeniedError(
                f"the credentials for bucket '{self._bucket}' have expired", "renew them; no restart is needed"
            )
        if code in _THROTTLED or status in {429, 503}:
            return ThrottledError(f"the store asks to slow down ({code}) for bucket '{self._bucket}'")
        if code in _DENIED or status in {401, 403}:
            return AccessDeniedError(
                f"access to bucket '{self._bucket}' {at} was denied ({code})",
                "check the credentials and the bucket's policy",
            )
        if status >= 500 or status == 307 or code in {"RequestTimeout", "InternalError"}:
            return TransientOriginError(f"the store failed with {code or status} for {where}")
        return OriginError(
            f"the store refused {where} ({code or status})", "check --endpoint-url, --region and addressing"
        )


def etag_of(info: ObjectInfo) -> str:
    """Return the ETag of an object version, in its quotes."""
    return info.id.version.partition(_VERSION_ID)[0]


def _pinned(info: ObjectInfo) -> dict[str, str]:
    """Return what makes a request fail, or not succeed otherwise, if the object has another version."""
    etag, _, version = info.id.version.partition(_VERSION_ID)
    return {"IfMatch": etag, **({"VersionId": version} if version else {})}


def _plain(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
