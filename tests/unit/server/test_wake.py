"""server/wake.py: what is to be seen is seen, and nobody else is woken."""

from __future__ import annotations

import os

from nbdshard.server.wake import Wake, is_readable


def test_it_is_readable_until_it_is_cleared() -> None:
    wake = Wake()
    assert not is_readable(wake.number)
    assert not wake.clear()
    wake.notify()
    wake.notify()
    assert is_readable(wake.number)
    assert wake.clear()
    assert not is_readable(wake.number)
    wake.close()


def test_who_notifies_too_late_does_nothing_to_who_has_the_number_next() -> None:
    wake = Wake()
    wake.close()
    next_one = os.eventfd(0, os.EFD_NONBLOCK)
    assert next_one == wake.number
    wake.notify()
    assert not is_readable(next_one)
    os.close(next_one)
