"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from cluster.config import ClusterConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ClusterConfig]:
    """The configurations that `neap serve` would have served."""
    configs: list[ClusterConfig] = []

    def serve(config: ClusterConfig) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr("cluster.cli.serve.serve", serve)
    monkeypatch.delenv("NEAP_API_KEY", raising=False)
    return configs
