"""`neap eval`: what it refuses, what it prints, and the comparison with an earlier report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from engine.tiny.skills import held_out


class Endpoint(BaseHTTPRequestHandler):
    """Knows all sums but the first."""

    answers = {one.messages[0]["content"]: one.answer for one in held_out("addition", 10)[1:]}

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = self.answers.get(body["messages"][-1]["content"], "?")
        self._reply({"choices": [{"message": {"role": "assistant", "content": text}}]})

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _reply(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


def test_help_names_the_options() -> None:
    said = run("--help")
    assert said.exit_code == 0
    assert all(word in said.output for word in ("--skills", "--url", "--json", "--show-wrong"))


def test_an_endpoints_accuracy_is_printed_and_written(url: str, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    said = run("--url", url, "--skills", "addition", "--count", "10", "--show-wrong", "--json", str(file))
    assert said.exit_code == 0, said.output
    assert "90.0%" in said.output
    assert held_out("addition", 1)[0].messages[0]["content"] in said.output
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["skills"]["addition"]["correct"] == 9
    assert len(report["answers"]["addition"]) == 10


@pytest.mark.parametrize(("was", "code"), [(0.9, 0), (0.8, 0), (0.904, 0), (1.0, 1)])
def test_a_skill_that_became_worse_fails(url: str, tmp_path: Path, was: float, code: int) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"skills": {"addition": {"accuracy": was, "asked": 10}}}))
    said = run("--url", url, "--skills", "addition", "--count", "10", "--compare", str(file))
    assert said.exit_code == code
    assert ("worse than" in said.output) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--skills", "poems"), "there is no skill poems"),
        (("--url", "http://x", "--model", "y"), "neither --model nor"),
        (("--model", "/nowhere"), "does not exist"),
        (("--compare", "/nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_told(arguments: tuple[str, ...], words: str) -> None:
    said = run(*arguments)
    assert said.exit_code == 1
    assert words in said.output
