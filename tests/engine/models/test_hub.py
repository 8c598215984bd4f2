"""Models by id: from a hub that the test starts, its cache, or told in words why not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from engine.llm import LLM
from engine.models.hub import News, is_hub_id, model_folder
from engine.request import SamplingParams
from engine.text.tokenizer import Tokenizer
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.random_checkpoint import make_random_checkpoint
from tests.engine.models.hub_server import COMMIT, HubServer, serving

ID = "neap-tests/tiny"
NEEDED = {
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repo")
    make_random_checkpoint(path, num_shards=2, vocab_size=write_byte_tokenizer(path))
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (path / name).write_bytes(b"not needed")
    return path


@pytest.fixture
def hub(repo: Path) -> Iterator[HubServer]:
    with serving({ID: repo}) as server:
        yield server


def test_only_what_serving_needs_is_fetched_and_only_once(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    path = model_folder(ID, endpoint=hub.url, cache_dir=tmp_path, progress=progress)
    assert {file.name for file in path.iterdir()} == NEEDED == set(hub.fetched)
    assert all((path / name).read_bytes() == (repo / name).read_bytes() for name in NEEDED)
    total = sum((repo / name).stat().st_size for name in NEEDED)
    assert seen[-1] == (total, total)
    assert model_folder(ID, endpoint=hub.url, cache_dir=tmp_path, revision=COMMIT) == path
    assert sorted(hub.fetched) == sorted(NEEDED)
    assert Tokenizer.load(path).encode("hi")


def test_the_cache_serves_where_the_hub_is_away(hub: HubServer, tmp_path: Path) -> None:
    path = model_folder(ID, endpoint=hub.url, cache_dir=tmp_path)
    hub.failing.add(ID)
    assert model_folder(ID, endpoint=hub.url, cache_dir=tmp_path) == path
    assert model_folder(ID, endpoint=closed_endpoint(), cache_dir=tmp_path) == path


def closed_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_refusals_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    hub.private.add("neap-tests/private")
    hub.gated.add("neap-tests/gated")
    hub.failing.add("neap-tests/failing")

    def refusal(model: str, revision: str = "", endpoint: str = hub.url) -> str:
        with pytest.raises(ValueError) as caught:
            model_folder(model, revision=revision, endpoint=endpoint, cache_dir=tmp_path)
        return str(caught.value)

    for model, status in (("neap-tests/absent", 404), ("neap-tests/private", 401)):
        text = refusal(model)
        assert f"no folder {model} here" in text and f"({status})" in text and "HF_TOKEN" in text
    assert "is gated: accept its terms" in refusal("neap-tests/gated")
    assert "no revision 'v9'" in refusal(ID, "v9")
    assert "500" in refusal("neap-tests/failing")
    away = refusal(ID, endpoint=closed_endpoint())
    assert "can't be reached" in away and f"{ID} is not, or not wholly, in {tmp_path}" in away


def test_a_repo_without_a_config_is_no_model(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("a data set")
    hub.repos["neap-tests/data"] = tmp_path / "empty"
    with pytest.raises(ValueError, match=r"neap-tests/data has no config\.json on the hub"):
        model_folder("neap-tests/data", endpoint=hub.url, cache_dir=tmp_path / "cache")


def test_a_folder_is_itself(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder(str(repo)) == repo
    (tmp_path / "neap-tests").mkdir()
    (tmp_path / ID).symlink_to(repo)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(ID) and model_folder(ID) == repo.resolve()
    with pytest.raises(ValueError, match="revision 'v1' means nothing for a folder"):
        model_folder(str(repo), revision="v1")
    with pytest.raises(ValueError, match=r"no checkpoint folder \(it has no config\.json\)"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize("model", ["/a/b", "./a/b", "~/a", "a", "a/b/c", "../b", "a/.b", "a b/c", "-a/b"])
def test_paths_are_not_taken_for_ids(model: str) -> None:
    assert not is_hub_id(model)
    with pytest.raises(ValueError, match="does not exist"):
        model_folder(model)


def run_child(*arguments: str, **environment: str) -> list[News]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "engine.models.hub", *arguments]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, timeout=100, check=False)
    return [msgspec.json.decode(line, type=News) for line in done.stdout.splitlines()]


def test_a_process_of_its_own_obeys_the_environment(hub: HubServer, tmp_path: Path) -> None:
    home = str(tmp_path)
    online = run_child(ID, HF_ENDPOINT=hub.url, HF_HOME=home)
    assert online[-1].path.endswith(COMMIT) and online[-1].path.startswith(home)
    assert any(news.total for news in online)
    offline = run_child(ID, "main", HF_ENDPOINT=closed_endpoint(), HF_HOME=home, HF_HUB_OFFLINE="1")
    assert offline[-1] == online[-1]
    absent = run_child("neap-tests/other", HF_HOME=home, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids the network" in absent[-1].error


def test_the_offline_api_takes_an_id(
    hub: HubServer,
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("engine.llm.model_folder", partial(model_folder, endpoint=hub.url, cache_dir=tmp_path))
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    answers = []
    for model in (ID, str(repo)):
        with LLM(model, kv_cache_bytes=4 << 20) as llm:
            answers.append(llm.generate("hi", params)[0].outputs.token_ids)
    assert answers[0] == answers[1] and len(answers[0]) == 5
    assert f"downloading {ID}: 0.00 of 0.00 GB" in capsys.readouterr().err
    assert set(hub.fetched) == NEEDED
