"""Files that hold a secret: read without trust in their size or kind, and refused where others than their owner can."""

from __future__ import annotations

import os
import stat

from nbdshard.common.errors import UserError


def read_text(path: str, bytes_max: int, what: str) -> tuple[str, os.stat_result]:
    """The text of a regular file, and what fstat(2) says about the very file that was read.

    `what` it should be ("a file of keys"), for errors. Raises UserError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise UserError("is not a regular file", path)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    finally:
        os.close(descriptor)
    if len(content) > bytes_max:
        raise UserError(f"is longer than {bytes_max} bytes; not {what}", path)
    return content.decode("utf-8", errors="replace"), facts


def check_private(path: str, facts: os.stat_result, what: str) -> None:
    """Refuse a file with a secret ("a secret key") that others can read. Raises UserError.

    systemd and Kubernetes hand theirs over as root's, readable by our group.
    """
    handed_over = facts.st_uid == 0 and os.geteuid() != 0
    exposed = facts.st_mode & (0o037 if handed_over else 0o077)
    if exposed:
        mode = stat.S_IMODE(facts.st_mode)
        raise UserError(f"holds {what} but its mode is {mode:04o}", path, f"make it private: chmod 600 {path}")
