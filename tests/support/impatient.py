"""A double: io_uring as on a kernel that answers EAGAIN where newer ones wait by themselves."""

from __future__ import annotations

import os

from nbdshard.common.ring.uring import UringRing


class ImpatientRing(UringRing):
    """Real io_uring, told by a flag never to wait for a socket: every such RECEIVE and SEND is tried, polled, tried."""

    socket_flags = os.RWF_NOWAIT
