"""`gs:` and `az:`: what obstore is told of them, and how their answers are read.

Google's store is played by moto, which speaks the same XML; its proxy puts Google's condition into S3's words. Azure's
way to speak has no server here: its errors are literal texts, as Azurite, Microsoft's own stand-in, gave them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import msgspec
import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.chain import DRIVERS
from nbdshard.server.credentials import Credentials
from nbdshard.server.opening import Opening
from nbdshard.server.parameters import Parameters
from nbdshard.server.stores.clouds import open_bucket
from nbdshard.server.stores.object_errors import is_missing, told
from support.s3 import BUCKET, S3, new_prefix
from support.s3_proxy import Proxied, proxied

ACCOUNT = Credentials("account", "c2VjcmV0")
BEARER = Credentials(variables={"GOOGLE_BEARER_TOKEN": "a token"})


@pytest.fixture
def google(s3: S3) -> Iterator[Proxied]:
    with proxied(s3) as found:
        yield found


def opening(google: Proxied, prefix: str, **parameters: str) -> Opening:
    place = f"{google.s3.endpoint}/{BUCKET}/{prefix}"
    return Opening("disk", place, Parameters(parameters, f"gs:{place}"), False, credentials=BEARER)


def test_an_image_in_chunks_at_googles(google: Proxied) -> None:
    prefix = new_prefix()
    image = DRIVERS["sharded"]["gs"].open(opening(google, prefix, size="1M", chunk="64K"))
    image.write(Range(65_530, 65_542), memoryview(b"hello, world"))
    image.zero(Range(0, 65_536), may_punch=True, fast=False)
    assert image.extents(Range(0, 1 << 20)) == [
        (Range(0, 65_536), 3),
        (Range(65_536, 131_072), 0),
        (Range(131_072, 1 << 20), 3),
    ]
    with pytest.raises(UserError, match="writes it, and was heard"):
        DRIVERS["sharded"]["gs"].open(opening(google, prefix))
    image.close()
    again = DRIVERS["sharded"]["gs"].open(opening(google, prefix))
    assert bytes(again.read(Range(65_536, 65_542))[0]) == b" world"  # type: ignore[arg-type]
    again.close()


def test_an_object_at_googles(google: Proxied) -> None:
    image = DRIVERS["raw"]["gs"].open(opening(google, f"{new_prefix()}/disk.img", size="9M"))
    image.write(Range(0, 5), memoryview(b"hello"))
    image.flush()
    assert b"".join(bytes(part) for part in image.read(Range(0, 5))) == b"hello"  # type: ignore[arg-type]
    image.close()


@pytest.mark.parametrize(
    ("scheme", "credentials", "what"),
    [
        ("gs", ACCOUNT, "a login in the CONN is of no use here; GOOGLE_APPLICATION_CREDENTIALS is to be set"),
        ("az", Credentials(), "Account must be specified"),
    ],
)
def test_what_is_missing_is_told_in_a_line(
    scheme: str, credentials: Credentials, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    wanted = Opening("disk", "bucket/x", Parameters({}, ""), False, credentials=credentials)
    with pytest.raises(UserError, match=what) as raised:
        open_bucket(scheme, wanted)
    assert "\n" not in str(raised.value) and ACCOUNT.password not in str(raised.value)


@pytest.mark.parametrize("place", ["container/x", "http://127.0.0.1:1/account/container/x"])
def test_an_account_of_azures_is_enough_to_begin_with(place: str) -> None:
    wanted = msgspec.structs.replace(Opening("disk", place, Parameters({}, ""), False), credentials=ACCOUNT)
    open_bucket("az", wanted).close()


AZURE_GET = """Object at location nope not found: Error performing GET REDACTED in 3.7ms - Server returned non-2xx \
status code: 404 Not Found: <?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>"""
AZURE_DELETE = """Object at location nope not found: Bulk delete request failed for key nope: The specified blob does \
not exist. (code: 404)

Debug source:
NotFound {
    path: "nope",
    source: DeleteFailed {
        path: "nope",
        code: "404",
        reason: "The specified blob does not exist.",
    },
}"""


@pytest.mark.parametrize("text", [AZURE_GET, AZURE_DELETE])
def test_azures_words_for_an_object_that_is_not_there(text: str) -> None:
    assert is_missing(FileNotFoundError(text))


def test_azures_words_for_a_container_that_is_not_there() -> None:
    error = FileNotFoundError(AZURE_GET.replace("BlobNotFound", "ContainerNotFound"))
    assert not is_missing(error)
    assert told(error, "reading x").strerror == "reading x: the object store answered 404 ContainerNotFound"


@pytest.mark.parametrize(
    ("text", "number", "sentence"),
    [
        ("operation timed out", errno.EIO, "the object store took too long"),
        ("Error performing token request: ...", errno.EACCES, "no credentials were found for the object store"),
        ("error sending request for url (http://user:password@host/?sig=abc)", errno.EIO, "cannot be reached"),
    ],
)
def test_nothing_of_a_message_goes_any_further(text: str, number: int, sentence: str) -> None:
    found = told(Exception(text), "reading x")
    assert found.errno == number
    assert sentence in str(found.strerror) and "password" not in str(found.strerror)
