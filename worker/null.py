"""`null:` as the destination: takes everything, keeps nothing."""

from __future__ import annotations

from nbdshard.common.limits import BLOCK_BYTES_MAX_DEFAULT
from nbdshard.common.messages import EndpointDescription
from nbdshard.worker.local import LocalConnection, Request

PEER = "null:"


class NullConnection(LocalConnection):
    """Every request is done as soon as it is begun, at the next `pump`.

    A spliced payload stays in its pipe: who owns it empties that.
    """

    @property
    def splices(self) -> bool:
        return True

    def _open(self) -> None:
        description = EndpointDescription(
            peer=PEER,
            size=None,
            can_multi_conn=True,
            can_flush=True,
            can_zero=True,
            block_maximum=BLOCK_BYTES_MAX_DEFAULT,
        )
        self._opened(description, None)

    def _begin(self, request: Request) -> None:
        self._answer(request)
