"""Every planted bug (bugs.py) is caught: by the seed that was seen to catch it, or else within some tens of others."""

from __future__ import annotations

import logging

import pytest

from cluster.sim.scenario import run_seed
from tests.cluster.sim.mutations.bugs import BUGS, Bug

NUM_SEEDS = 60


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # what a bug makes the engine log is long and not asked for
    bug.plant(monkeypatch)
    seeds = [bug.seed, *(seed for seed in range(NUM_SEEDS) if seed != bug.seed)]
    assert any(run_seed(seed).violations for seed in seeds)


def test_there_are_at_least_ten() -> None:
    assert len({bug.name for bug in BUGS}) >= 10
