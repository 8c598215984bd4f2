"""`neap status --why`: the router's words as they are, and what is said when there are none."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from cluster.cli.status import show_why, why
from cluster.control.router_client import RouterClient, RouterError

DECISION: dict[str, Any] = {
    "request_id": "abc",
    "age_s": 1.25,
    "words": ["100 prompt tokens: d0 does both.", "Why (predicted): [the least] cost."],
}


def shown(body: dict[str, Any], request_id: str = "") -> str:
    out = StringIO()
    show_why(body, request_id, Console(file=out, width=140))
    return out.getvalue()


def test_each_decision_is_a_paragraph_the_newest_last() -> None:
    older = {**DECISION, "request_id": "old", "age_s": 9.0}
    lines = shown({"decisions": [DECISION, older]}).splitlines()
    assert lines[0] == "request old, 9.0 s ago"
    assert lines[3:] == ["request abc, 1.2 s ago", *(f"  {line}" for line in DECISION["words"])]


def test_an_unknown_request_and_an_idle_router_are_said() -> None:
    assert "request x is not among the last decisions" in shown({"decisions": []}, "x")
    assert "no request has come yet" in shown({"decisions": []})


@pytest.mark.parametrize(("decisions", "asked", "code"), [([DECISION], "abc", 0), ([], "abc", 4), ([], "", 0)])
def test_the_exit_code_tells_whether_the_request_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], decisions: list[Any], asked: str, code: int
) -> None:
    paths: list[str] = []

    def get(self: RouterClient, path: str) -> tuple[int, dict[str, Any]]:
        paths.append(path)
        return 200, {"decisions": decisions}

    monkeypatch.setattr(RouterClient, "get", get)
    client = RouterClient(host="h", port=1)
    assert why(client, asked, as_json=False) == code and paths == [f"/status/why?request_id={asked}"]
    assert why(client, asked, as_json=True) == code
    assert '"decisions"' in capsys.readouterr().out


def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"error": {"code": "invalid_api_key", "message": "No."}}
    monkeypatch.setattr(RouterClient, "get", lambda self, path: (401, body))
    with pytest.raises(RouterError, match="401 invalid_api_key: No"):
        why(RouterClient(host="h", port=1), "", as_json=False)
