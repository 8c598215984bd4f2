"""Both keepers of a registry, in turn."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each keeper in turn."""
    value: str = request.param
    return value
