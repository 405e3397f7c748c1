"""What stands after `?` in a CONN, as who is meant by it reads it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nbdshard.common.errors import UserError
from nbdshard.common.units import parse_seconds, parse_size


class Parameters:
    """Values by name, as they were written. `where`: what errors name, usually the CONN.

    Every method gives None, or the `default`, where nothing was said; and raises UserError for what it cannot read.
    """

    def __init__(self, values: Mapping[str, str], where: str) -> None:
        self._values = values
        self.where = where

    def names(self) -> frozenset[str]:
        """Those that were given."""
        return frozenset(self._values)

    def text(self, name: str) -> str | None:
        """As it is."""
        return self._values.get(name)

    def size(self, name: str) -> int | None:
        """In bytes: "64k", "1G"."""
        value = self._values.get(name)
        return None if value is None else parse_size(value, f"{self.where}: {name}=")

    def seconds(self, name: str) -> float | None:
        """ "2s", "250ms", "1m"."""
        value = self._values.get(name)
        return None if value is None else parse_seconds(value, f"{self.where}: {name}=")

    def count(self, name: str, least: int, most: int) -> int | None:
        """A whole number between these, both included."""
        value = self._values.get(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 20 and least <= int(value) <= most):
            raise UserError(f"{name}={value}: a number from {least} to {most} is expected", self.where)
        return int(value)

    def choice(self, name: str, known: Collection[str], default: str) -> str:
        """One of the words `known`."""
        value = self._values.get(name, default)
        if value not in known:
            raise UserError(f"{name}={value}: {' or '.join(known)} is expected", self.where)
        return value

    def flag(self, name: str) -> bool:
        """yes or no, which is the default."""
        return self.choice(name, ("yes", "no"), "no") == "yes"
