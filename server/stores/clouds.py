"""Where a volume in the cloud is, and the drivers over it: `s3:`, `gs:` and `az:`.

::

    s3:http://host:9000/bucket/prefix     a server of one's own, by path
    s3:bucket/prefix                      AWS, or what AWS_ENDPOINT_URL says
    gs:bucket/prefix
    az:container/prefix                   of the account that is part of the credentials
    az:http://host:10000/account/container/prefix

What logs in comes from a file, the environment or the CONN (`server/credentials.py`). Where there is nothing of ours,
obstore looks further: for the role of a machine, say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, cast

import msgspec
from obstore.store import AzureStore, GCSStore, S3Store
from obstore.store import ObjectStore as Client

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    OBJECT_CALL_SECONDS,
    OBJECT_CALL_SECONDS_MAX,
    OBJECT_RETRY_SECONDS,
    OBJECT_SPOOL_BYTES,
    OBJECT_SPOOL_BYTES_MIN,
)
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.ranges import Range
from nbdshard.common.units import format_bytes
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.object import ObjectBackend, WholeObject
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.credentials import Credentials, of_environment
from nbdshard.server.layers.spread import Spread
from nbdshard.server.opening import Opening
from nbdshard.server.stores.base import Store
from nbdshard.server.stores.bucket import Bucket, client_options, retry_config
from nbdshard.server.stores.leases import Lease
from nbdshard.server.stores.objects import ObjectStore
from nbdshard.server.volumes import Volume

if TYPE_CHECKING:  # obstore has these as stubs only
    from obstore.store import AzureConfig, GCSConfig, S3Config, S3Credential

_URL: Final = re.compile(r"(https?)://([^/]+)(?:/(.*))?")
_AWS_KEY: Final = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_AWS_PLACE: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_AWS_REGION: Final = ("AWS_REGION", "AWS_DEFAULT_REGION")


class Place(msgspec.Struct, frozen=True):
    """`endpoint`: where a store of one's own is, "" elsewhere; `bucket` and `prefix` in it."""

    endpoint: str
    bucket: str
    prefix: str


def parse_place(place: str) -> Place:
    """What stands behind `s3:`, `gs:` or `az:`. Raises UserError."""
    endpoint, rest = "", place
    if "://" in place:
        match = _URL.fullmatch(place)
        if match is None:
            raise UserError("http://HOST:PORT/BUCKET/PREFIX is expected", place)
        endpoint, rest = f"{match[1]}://{match[2]}", match[3] or ""
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UserError("no bucket is named", place)
    words = [word for word in prefix.split("/") if word]
    if any(word in (".", "..") for word in words):
        raise UserError("a prefix with . or .. in it", place)
    return Place(endpoint, bucket, "/".join(words))


def open_store(scheme: str, opening: Opening) -> ObjectStore:
    """A store of chunks. Nothing is asked of it yet. Raises UserError."""
    return ObjectStore(
        open_bucket(scheme, opening),
        read_only=opening.read_only,
        steal=opening.parameters.flag("steal"),
        can_list=opening.parameters.choice("listing", ("yes", "no"), "yes") == "yes",
    )


def drive(store: Store, volume: Volume, read_only: bool) -> Backend:
    """`volume` in a store that was opened here."""
    assert isinstance(store, ObjectStore)
    store.track(volume)
    return Spread(ShardedBackend(store, volume, read_only=read_only), volume.chunk_bytes)


def open_raw(scheme: str, opening: Opening) -> Backend:
    """An image that is one object. Raises UserError."""
    where = f"{scheme}:{opening.place}"
    place = parse_place(opening.place)
    folder, _, key = place.prefix.rpartition("/")
    if not key:
        raise UserError("no object is named", where, "BUCKET/NAME is expected")
    parameters = opening.parameters
    spool_bytes = parameters.size("spool") or OBJECT_SPOOL_BYTES
    if spool_bytes < OBJECT_SPOOL_BYTES_MIN:
        raise UserError(f"spool={spool_bytes}: at least {format_bytes(OBJECT_SPOOL_BYTES_MIN)} are needed", where)
    bucket = open_bucket(scheme, opening, msgspec.structs.replace(place, prefix=folder))
    try:
        if opening.read_only:
            return _whole(bucket, key, None)
        lease = Lease(bucket, key, steal=parameters.flag("steal"))
        try:
            return ObjectBackend(_whole(bucket, key, parameters.size("size")), lease, spool_bytes)
        except BaseException:
            lease.release()
            raise
    except (UserError, OSError) as error:
        bucket.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be opened: {error.strerror}", where) from None


def _whole(bucket: Bucket, key: str, size: int | None) -> WholeObject:
    found = bucket.get(key, Range(0, 1))
    if found is None and size is None:
        raise UserError("there is no such object", key, "size= makes a new one")
    there = size or 0 if found is None else found.size
    if size not in (None, there):
        raise UserError(f"size={size}, and the object has {there} bytes", key)
    if not 0 < there <= EXPORT_BYTES_MAX:
        raise UserError(f"a size of {there} bytes", key)
    return WholeObject(bucket, key, there, is_there=found is not None)


def open_bucket(scheme: str, opening: Opening, place: Place | None = None) -> Bucket:
    """The bucket that `opening` names, or of `place`. Nothing is asked of it yet. Raises UserError."""
    place = place or parse_place(opening.place)
    given = opening.parameters.seconds("timeout")
    seconds = OBJECT_CALL_SECONDS if given is None else given
    where = f"{scheme}:{opening.place}"
    if not 1 <= seconds <= OBJECT_CALL_SECONDS_MAX:
        raise UserError(f"timeout={seconds:g}s: 1s to {OBJECT_CALL_SECONDS_MAX:g}s is expected", where)
    try:
        client = _CLIENTS[scheme](place, opening.credentials, seconds)
    except UserError as error:
        raise UserError(str(error), where) from None
    except Exception as error:  # obstore's own kinds, which name what is missing; a secret would not be
        raise UserError(logs.printable(str(error).partition("\n")[0]), where) from None
    return Bucket(client, seconds + OBJECT_RETRY_SECONDS)


def _s3(place: Place, credentials: Credentials, seconds: float) -> Client:
    variables = credentials.variables or of_environment().variables
    endpoint = place.endpoint or _first(variables, _AWS_PLACE)
    config: S3Config = {
        "region": _first(variables, _AWS_REGION) or "us-east-1",
        "disable_bulk_delete": True,  # one object at a time is deleted, and not every store has the other call
    }
    if place.endpoint:  # under both names, and by path: obstore would rather believe the environment, of another store
        config |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint, "virtual_hosted_style_request": False}
    elif endpoint:
        config["endpoint"] = endpoint
    user, password = credentials.user, credentials.password
    token = None
    if not user:
        user, password = variables.get("AWS_ACCESS_KEY_ID", ""), variables.get("AWS_SECRET_ACCESS_KEY", "")
        token = variables.get("AWS_SESSION_TOKEN")
    if bool(user) != bool(password):
        raise UserError("there is one of a key's id and its secret", advice=f"{_AWS_KEY} are to be set, both")
    if endpoint and not user and variables.get("AWS_SKIP_SIGNATURE") != "true":
        raise UserError("no credentials are given", advice=f"{_AWS_KEY} are to be set")
    if user:
        config["skip_signature"] = False
    # A provider, because obstore would add what it finds in the environment: the token of another account.
    given: S3Credential = {
        "access_key_id": user,
        "secret_access_key": password,
        "token": token,
        "expires_at": None,
    }
    return S3Store(
        place.bucket,
        prefix=place.prefix or None,
        config=config,
        client_options=client_options(seconds, plain=endpoint.startswith("http://")),
        retry_config=retry_config(),
        credential_provider=(lambda: given) if user else None,
    )


def _gs(place: Place, credentials: Credentials, seconds: float) -> Client:
    if credentials.user:
        raise UserError("a login in the CONN is of no use here", advice="GOOGLE_APPLICATION_CREDENTIALS is to be set")
    config = cast("GCSConfig", _known(credentials.variables, "GOOGLE_"))
    if place.endpoint:
        config["google_base_url"] = place.endpoint  # type: ignore[typeddict-unknown-key]
    return GCSStore(
        place.bucket,
        prefix=place.prefix or None,
        config=config,
        client_options=client_options(seconds, plain=place.endpoint.startswith("http://")),
        retry_config=retry_config(),
    )


def _az(place: Place, credentials: Credentials, seconds: float) -> Client:
    config = cast("AzureConfig", _known(credentials.variables, "AZURE_"))
    if credentials.user:
        config = {"account_name": credentials.user, "account_key": credentials.password}
    if place.endpoint:
        account = config.get("account_name") or config.get("azure_storage_account_name") or ""
        if place.bucket == account:  # a store of one's own has accounts as folders
            container, _, prefix = place.prefix.partition("/")
            place = Place(f"{place.endpoint}/{account}", container, prefix)
        config["endpoint"] = place.endpoint
    return AzureStore(
        place.bucket,
        prefix=place.prefix or None,
        config=config,
        client_options=client_options(seconds, plain=place.endpoint.startswith("http://")),
        retry_config=retry_config(),
    )


_CLIENTS: Final[Mapping[str, Callable[[Place, Credentials, float], Client]]] = {"s3": _s3, "gs": _gs, "az": _az}


def _known(variables: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.lower(): text for name, text in variables.items() if name.startswith(prefix)}


def _first(variables: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((variables[name] for name in names if variables.get(name)), "")
