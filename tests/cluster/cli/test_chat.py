"""Chat and status against scripted answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from cluster.cli.chat import ChatOptions, chat, printable
from cluster.cli.status import show, status
from cluster.control.router_client import RouterClient, RouterError

OPTIONS = ChatOptions(model="", system="be brief", max_tokens=5, temperature=0.5)


class ScriptedRouter(RouterClient):
    """Answers what it was told to, and notes what it was asked."""

    def __init__(self, events: list[dict[str, Any]], body: dict[str, Any] | None = None, status: int = 200) -> None:
        super().__init__(host="h", port=1)
        object.__setattr__(self, "asked", [])
        object.__setattr__(self, "script", (events, body or {"data": [{"id": "tiny"}]}, status))

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        _, body, status = self.script  # type: ignore[attr-defined]
        return status, body

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.asked.append(body)  # type: ignore[attr-defined]
        yield from self.script[0]  # type: ignore[attr-defined]


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def test_piped_input_is_answered_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is neap tide?\n"))
    router = ScriptedRouter(
        [piece("It is "), piece("calm.\x1b[2J"), {"choices": [], "usage": {"completion_tokens": 2}}]
    )
    assert chat(router, OPTIONS) == 0
    assert capsys.readouterr().out == "It is calm.\ufffd[2J\n"
    (body,) = router.asked  # type: ignore[attr-defined]
    assert body["model"] == "tiny"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (5, 0.5, True)


def test_an_error_event_ends_a_piped_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    error = {"error": {"code": "decode_worker_lost", "message": "The worker was lost."}}
    with pytest.raises(RouterError, match="decode_worker_lost: The worker was lost"):
        chat(ScriptedRouter([piece("a"), error]), OPTIONS)


def test_a_model_that_is_not_ready_is_told() -> None:
    with pytest.raises(RouterError, match="neap status"):
        chat(ScriptedRouter([], {"data": []}), OPTIONS)


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\n\tb\x1b[31m\x07\x9b\u202e") == "a\n\tb\ufffd[31m\ufffd\ufffd\ufffd"


STATUS: dict[str, Any] = {
    "model": "tiny",
    "version": "0.1.0",
    "uptime_s": 3.4,
    "readiness": {"status": "starting", "reason": "No decode worker is ready."},
    "requests": {"running": 1, "queued": 2},
    "workers": [
        {
            "worker_id": "decode-0",
            "role": "decode",
            "epoch": 4,
            "state": "ready",
            "link": "up",
            "node": "n1",
            "pid": 77,
            "load": {"running": 3, "waiting": 0, "served": 1, "kv_use": 0.25},
        },
        {"worker_id": "p-0", "role": "prefill", "epoch": 1, "state": "starting", "link": "down", "node": "", "pid": 0},
    ],
}


def test_status_shows_each_worker(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    show(STATUS, Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert "No decode worker is ready." in lines[0]
    assert lines[3].split() == ["decode-0", "decode", "4", "ready", "up", "3", "0", "1", "25%", "n1", "77"]
    assert lines[4].split() == ["p-0", "prefill", "1", "starting", "down", "-", "-", "-", "-", "0"]
    assert status(ScriptedRouter([], STATUS), as_json=True) == 3
    assert json.loads(capsys.readouterr().out) == STATUS


def test_an_error_status_is_an_error() -> None:
    body = {"error": {"code": "invalid_api_key", "message": "The API key is missing or wrong."}}
    with pytest.raises(RouterError, match="401 invalid_api_key"):
        status(ScriptedRouter([], body, 401), as_json=False)
