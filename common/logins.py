"""Passwords in URLs, which nothing shows. Pure."""

from __future__ import annotations

import re
from typing import Final

HIDDEN: Final = "***@"
_LOGIN: Final = re.compile(r"(?<=://).*@", re.DOTALL)


def without_logins(text: str) -> str:
    """`text` with *** for whatever could be USER:PASSWORD of a URL in it."""
    return _LOGIN.sub(HIDDEN, text)
