"""What the tests of the controller share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A state folder of the test's own: notes of admin APIs are not left where people look for theirs."""
    monkeypatch.setenv("NEAP_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("NEAP_ADMIN_TOKEN", raising=False)
    return tmp_path / "state"
