"""Run as a program: `python refused.py ERRNO WISH` opens a ring where a seccomp filter answers io_uring_setup(2).

A real filter, as Docker's default profile is one, installed for this process only and for good. ERRNO is a name
("EPERM"); "register" refuses io_uring_register(2) with EPERM instead, "module" hides the module liburing, "nothing"
changes nothing.
Prints the ring's line, or "UserError: ..." and the error's line.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

IO_URING_SETUP, IO_URING_REGISTER = 425, 427  # on every architecture
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RETURN_ERRNO, RETURN_ALLOW = 0x00050000, 0x7FFF0000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(call: int, number: int) -> None:
    """From now on the system call with the number `call` fails with errno `number` in this process."""
    code = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (LOAD_WORD, 0, 0, 0),  # the number of the system call
            (JUMP_IF_EQUAL, 0, 1, call),
            (RETURN, 0, 0, RETURN_ERRNO | number),
            (RETURN, 0, 0, RETURN_ALLOW),
        )
    )
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(cause: str, wish: str) -> None:
    from nbdshard.common.errors import UserError
    from nbdshard.common.ring import open_ring

    if cause == "module":
        sys.modules["liburing"] = None  # type: ignore[assignment]  # an import of it raises ImportError now
    elif cause == "register":
        refuse(IO_URING_REGISTER, errno.EPERM)
    elif cause != "nothing":
        refuse(IO_URING_SETUP, getattr(errno, cause))
    try:
        ring, line = open_ring(wish)
    except UserError as error:
        print(f"UserError: {error}")
    else:
        print(line)
        ring.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
