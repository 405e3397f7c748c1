"""What an object store said that went wrong: an errno and a sentence for the client, without anything secret.

obstore's messages hold addresses, queries (an Azure signature is one) and whole replies; only a status and a code,
which are looked for by their form, go any further.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from nbdshard.common.logs import printable

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>")
_NO_OBJECT: Final = frozenset({"NoSuchKey", "BlobNotFound"})  # S3's and Google's name for it, Azure's
_NOT_DELETED: Final = re.compile(r"DeleteFailed \{.*code: \"404\"", re.DOTALL)  # Azure's, where several are deleted
_NUMBERS: Final[Mapping[int, int]] = MappingProxyType(
    {
        401: errno.EACCES,
        403: errno.EACCES,
        413: errno.ENOSPC,  # what Swift says of a quota
        507: errno.ENOSPC,
    }
)
_FULL: Final = frozenset({"QuotaExceeded", "ServiceQuotaExceeded", "InsufficientStorage", "XMinioStorageFull"})
_BAD_NAME: Final = re.compile(r"Encountered illegal character|InvalidPath|unable to convert path", re.IGNORECASE)
_TIMED_OUT: Final = re.compile(r"timed out|TimedOut|kind: Timeout")


def is_missing(error: BaseException) -> bool:
    """Whether there is no such object. Another 404, such as of a bucket that is gone, must not look like zeroes."""
    if not isinstance(error, FileNotFoundError):
        return False
    return _code(error) in _NO_OBJECT or _NOT_DELETED.search(str(error)) is not None


def is_beyond_the_end(error: BaseException) -> bool:
    """Whether a range was asked for that begins behind an object's last byte."""
    return _status(error) == 416


def is_taken(error: BaseException) -> bool:
    """Whether an object that was to be made is there, or is just being made."""
    return type(error).__name__ in ("AlreadyExistsError", "PreconditionError") or _status(error) in (409, 412)


def told(error: BaseException, doing: str) -> OSError:
    """`error` as what a client is told; `doing`: "reading disk.1.chunk"."""
    status, code, doing = _status(error), _code(error), printable(doing)
    if status is None:
        if _BAD_NAME.search(str(error)):
            return OSError(errno.EINVAL, f"{doing}: an object cannot have this name")
        if _TIMED_OUT.search(str(error)):
            return OSError(errno.EIO, f"{doing}: the object store took too long")
        if _CREDENTIALS.search(str(error)):
            return OSError(errno.EACCES, f"{doing}: no credentials were found for the object store")
        return OSError(errno.EIO, f"{doing}: the object store cannot be reached")
    number = errno.ENOSPC if code in _FULL else _NUMBERS.get(status, errno.EIO)
    return OSError(number, f"{doing}: the object store answered {status}{f' {code}' if code else ''}")


_CREDENTIALS: Final = re.compile(r"redential|token request", re.IGNORECASE)


def _status(error: BaseException) -> int | None:
    found = _STATUS.search(str(error))
    return None if found is None else int(found[1])


def _code(error: BaseException) -> str:
    found = _CODE.search(str(error))
    return "" if found is None else found[1]
