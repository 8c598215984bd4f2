"""`neap switch` and `neap drain`: which cluster is meant, what is printed, and the exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from cluster.cli.status import why
from cluster.control.admin_note import AdminNote
from cluster.control.router_client import RouterClient, RouterError

ANSWER = {"outcome": "switched", "words": "decode-0 is prefill now, in 12 ms"}
ROUTER = "http://127.0.0.1:8180"


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NEAP_STATE", str(tmp_path))
    monkeypatch.delenv("NEAP_ADMIN_TOKEN", raising=False)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str, Any]]:
    """(url, token, path, body) of what was posted; everything succeeds."""
    seen: list[tuple[str, str, str, Any]] = []

    def post(self: RouterClient, path: str, body: dict[str, Any], timeout_s: float) -> tuple[int, dict[str, Any]]:
        seen.append((self.url, self.api_key, path, body))
        return 200, ANSWER

    monkeypatch.setattr(RouterClient, "post", post)
    return seen


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def note(url: str = "http://127.0.0.1:8179", *routers: str, pid: int | None = None) -> None:
    path = AdminNote(url=url, token="note", routers=routers or (ROUTER,), pid=pid or os.getpid()).write(
        Path("/nowhere")
    )
    assert path is not None


def test_the_only_cluster_that_runs_here_is_meant(asked: list[Any]) -> None:
    note()
    assert run("switch", "decode-0", "--to", "prefill") == (0, ANSWER["words"] + "\n")
    assert run("drain", "a/b") == (0, ANSWER["words"] + "\n")
    assert asked == [
        ("http://127.0.0.1:8179", "note", "/v1/workers/decode-0/switch", {"role": "prefill"}),
        ("http://127.0.0.1:8179", "note", "/v1/workers/a%2Fb/drain", {}),
    ]
    assert json.loads(run("switch", "decode-0", "--to", "prefill", "--json")[1]) == ANSWER


def test_a_router_s_address_names_its_cluster_and_another_wants_a_token(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    note()
    run("drain", "w", "--url", "http://localhost:8180/v1")
    run("drain", "w", "--url", "http://127.0.0.1:8179", "--token", "mine")
    monkeypatch.setenv("NEAP_ADMIN_TOKEN", "env")
    run("drain", "w", "--url", "http://far:9")
    assert [(url, token) for url, token, _, _ in asked] == [
        ("http://127.0.0.1:8179", "note"),
        ("http://127.0.0.1:8179", "mine"),
        ("http://far:9", "env"),
    ]


def test_several_clusters_or_none_are_told(asked: list[Any]) -> None:
    code, output = run("drain", "w")
    assert code == 1 and "no cluster of yours runs on this machine" in output
    note()
    note("http://127.0.0.1:9999", pid=1)
    code, output = run("drain", "w")
    assert code == 1 and "several clusters run here" in output and "http://127.0.0.1:9999" in output
    assert asked == []


@pytest.mark.parametrize(("status", "code"), [(404, 4), (409, 3), (502, 1), (401, 1)])
def test_an_error_is_told_in_its_words_and_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    note()
    body = {"error": {"message": "decode-0 is the last.", "code": "last_decode_worker"}}
    monkeypatch.setattr(RouterClient, "post", lambda *_: (status, body))
    assert run("drain", "decode-0") == (code, "decode-0 is the last. (last_decode_worker)\n")


def test_mistakes_and_silence_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    note()
    assert run("switch", "w", "--to", "king")[0] == 2
    assert run("switch", "w", "--to", "decode", "--url", "https://x")[0] == 2

    def post(*_: Any) -> Any:
        raise RouterError("no answer from there")

    monkeypatch.setattr(RouterClient, "post", post)
    assert run("drain", "w") == (1, "neap: no answer from there\n")


def test_why_tells_what_the_planner_of_this_router_s_cluster_thinks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {"age_s": 5.0, "worker_id": "decode-0", "role": "prefill", "why": "prompts are long"}
    plans = {
        "auto": True,
        "plan": {"age_s": 0.5, "words": ["[no] change."]},
        "changes": [change | {"outcome": "switched", "words": "decode-0 is prefill now"}],
    }
    monkeypatch.setattr(
        RouterClient, "get", lambda self, path: (200, plans if path == "/v1/plans" else {"decisions": []})
    )
    client = RouterClient(host="127.0.0.1", port=8180)
    assert why(client, "", as_json=False) == 0
    assert "prefill" not in capsys.readouterr().out  # nobody has left a note
    note()
    assert why(client, "", as_json=False) == 0
    output = capsys.readouterr().out
    assert "decode-0 to prefill, 5.0 s ago: switched" in output and "Why: prompts are long." in output
    assert "[no] change." in output
    assert why(client, "", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["roles"] == plans
    assert why(client, "abc", as_json=False) == 4  # one request's story has nothing to do with roles
