"""The sans-I/O NBD core: bytes in, events out, both sides of the protocol. No I/O, clock or ring here."""
