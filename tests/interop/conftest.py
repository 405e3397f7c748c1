"""For all interop tests: each runs on both rings unless it names one itself."""

from __future__ import annotations

import pytest

from support.sides import RINGS


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    """Both implementations of the ring, in turn."""
    return str(request.param)
