"""The I/O loop: `interface` is the contract, `uring` and `epoll` keep it, `choose` picks one of them."""

from nbdshard.common.ring.choose import open_ring
from nbdshard.common.ring.interface import Descriptor, Kind, Operation, Ring, Splice

__all__ = ["Descriptor", "Kind", "Operation", "Ring", "Splice", "open_ring"]
