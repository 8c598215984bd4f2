"""A model given by its id is fetched in a process of its own; wrong folders are told at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.model_source import checked_model, find_model
from cluster.config import ClusterConfig
from engine.tiny.random_checkpoint import make_random_checkpoint
from tests.engine.models.hub_server import COMMIT, HubServer, serving

ID = "neap-tests/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving({ID: make_random_checkpoint(tmp_path / "repo")}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


def test_a_model_of_the_hub_is_fetched_and_progress_is_told(hub: HubServer, tmp_path: Path) -> None:
    told: list[str] = []
    config = checked_model(ClusterConfig(model=ID))
    assert config.served_model_name == ID
    path = Path(asyncio.run(find_model(config, told.append)))
    assert path.name == COMMIT and path.is_relative_to(tmp_path / "home")
    assert (path / "model.safetensors").is_file()
    assert told and told[-1].startswith(f"downloading {ID}: ")


def test_a_model_that_is_not_there_is_told(hub: HubServer) -> None:
    with pytest.raises(ValueError, match=r"no folder neap-tests/other here, .* \(404\)"):
        asyncio.run(find_model(ClusterConfig(model="neap-tests/other", revision="main"), print))


def test_an_own_name_goes_before_the_id() -> None:
    assert checked_model(ClusterConfig(model=ID, served_model_name="mine")).served_model_name == "mine"


def test_a_folder_keeps_its_name_and_must_be_a_checkpoint(tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "m")
    config = checked_model(ClusterConfig(model=str(folder)))
    assert config.served_model_name == "" and config.model_name(str(folder)) == "m"
    assert asyncio.run(find_model(config, print)) == str(folder)
    with pytest.raises(ValueError, match="no checkpoint folder"):
        checked_model(ClusterConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="revision"):
        checked_model(ClusterConfig(model=str(folder), revision="v1"))
