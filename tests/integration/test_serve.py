"""`neap serve` as a user runs it: ready box, openai SDK, chat, status, restarts, and an end without leftovers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from engine.tiny.skills import held_out

READY_S = 110.0
END_S = 60.0
(EXAMPLE,) = held_out("lookup-100", 1)  # long enough to be worth another worker's while
QUESTION: Any = list(EXAMPLE.messages[:-1])


class Serving:
    """A running `neap serve` whose output is read as it comes."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self.output = home / f"serve-{time.monotonic_ns()}.log"
        self.env = {**os.environ, "NEAP_CACHE": str(home / "cache"), "HOME": str(home), "TMPDIR": str(home)}
        self._file = self.output.open("wb")
        self.process = psutil.Popen(
            [sys.executable, "-m", "neap", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=self.env,
        )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, wanted: Callable[[], bool], seconds: float = READY_S) -> None:
        deadline = time.monotonic() + seconds
        while not wanted():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def wait_until_ready(self) -> None:
        self.until(lambda: "curl http" in self.text())

    @property
    def url(self) -> str:
        match = re.search(r"endpoint\s+(http://127\.0\.0\.1:\d+)/v1", self.text())
        assert match is not None
        return match[1]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def neap(self, *arguments: str, stdin: str = "", codes: tuple[int, ...] = (0,)) -> str:
        """The output of another neap command against this server."""
        command = [sys.executable, "-m", "neap", *arguments, "--url", self.url]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=self.env, check=False)
        assert done.returncode in codes, done.stderr + done.stdout
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What the router sees, while the model can be served (exit code 0) and while it can't (3)."""
        value: dict[str, Any] = json.loads(self.neap("status", "--json", codes=(0, 3)))
        return value

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit code. Fails if a process is left behind."""
        family = self.family()
        self.process.send_signal(number)
        _, left = psutil.wait_procs(family, timeout=END_S)
        words = [" ".join(process.cmdline())[:120] for process in left if process.is_running()]
        for process in left:
            process.kill()
        assert not words, f"left behind: {words}\n{self.text()}"
        code: int = self.process.wait()
        return code


@contextmanager
def serving(home: Path, *arguments: str) -> Iterator[Serving]:
    server = Serving(list(arguments), home)
    try:
        yield server
    finally:
        for process in server.family() if server.process.is_running() else []:
            process.kill()
        server.process.wait(END_S)
        server._file.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def answers_the_openai_sdk(server: Serving, *, rightly: bool = True) -> None:
    """Streamed and whole answers are the same text, made by a prefill and a decode worker."""
    with server.client() as client:
        (model,) = client.models.list().data
        options: dict[str, Any] = {"model": model.id, "messages": QUESTION, "max_tokens": 24, "seed": 7}
        whole = client.chat.completions.with_raw_response.create(**options)
        answer = whole.parse()
        assert whole.headers["x-neap-path"] == "prefill-decode"
        assert answer.usage.completion_tokens <= 24
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(stream=True, **options)
            if chunk.choices
        ]
        assert "".join(pieces) == answer.choices[0].message.content
        assert not rightly or "".join(pieces) == EXAMPLE.answer, "the exact fake knows nothing"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="another", messages=QUESTION)


def loses_a_worker_and_gets_it_back(server: Serving, worker_id: str) -> None:
    """Killed, told, started again as a new incarnation, and linked."""
    before = {w["worker_id"]: w for w in server.status()["workers"]}
    psutil.Process(before[worker_id]["pid"]).kill()
    server.until(lambda: f"{worker_id} ended" in server.text())

    def is_back() -> bool:
        after = {w["worker_id"]: w for w in server.status()["workers"]}
        worker = after.get(worker_id, {"incarnation": "", "state": "", "link": ""})
        new = worker["incarnation"] != before[worker_id]["incarnation"]
        return new and (worker["state"], worker["link"]) == ("ready", "up")

    server.until(is_back)


@pytest.mark.timeout(300)
def test_processes_serve_the_default_model_and_ctrl_c_leaves_nothing(home: Path) -> None:
    with serving(home, "--backend", "process", "--require-prefill") as server:
        server.wait_until_ready()
        answers_the_openai_sdk(server)
        workers = server.status()["workers"]
        assert [(w["worker_id"], w["role"], w["state"]) for w in workers] == [
            ("decode-0", "decode", "ready"),
            ("prefill-0", "prefill", "ready"),
        ]
        assert "Paris" in server.neap("chat", "--max-tokens", "8", stdin="What is the capital of France?")
        assert server.end(signal.SIGINT) == 0
        assert list(home.glob("neap-*")) == []  # nothing went wrong, so no logs are kept


@pytest.mark.timeout(300)
def test_a_killed_worker_is_told_and_comes_back_and_a_killed_serve_takes_all_with_it(home: Path) -> None:
    with serving(home, "--backend", "process", "--require-prefill", "--set", "fake.vocab_size=3072") as server:
        server.wait_until_ready()
        loses_a_worker_and_gets_it_back(server, "prefill-0")
        answers_the_openai_sdk(server, rightly=False)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.timeout(300)
def test_ray_places_named_actors_behind_a_token_and_ctrl_c_leaves_nothing(home: Path) -> None:
    with serving(home, "--backend", "ray", "--require-prefill") as server:
        server.wait_until_ready()
        answers_the_openai_sdk(server)
        box = server.text()
        token_path = Path(re.search(r"Ray token\s+(\S+)", box)[1])  # type: ignore[index]
        dashboard = re.search(r"Ray dashboard\s+(\S+)", box)[1]  # type: ignore[index]
        assert (token_path.stat().st_mode & 0o077, token_path.parent) == (0, home / ".ray")
        actors_url = f"{dashboard}/api/v0/actors"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(actors_url, timeout=30).close()
        request = urllib.request.Request(actors_url, headers={"Authorization": f"Bearer {token_path.read_text()}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            actors = json.load(response)["data"]["result"]["result"]
        names = {actor["name"].partition("@")[0] for actor in actors}
        assert names == {"prefill-0", "decode-0"}
        loses_a_worker_and_gets_it_back(server, "decode-0")
        answers_the_openai_sdk(server)
        assert server.end(signal.SIGINT) == 0


@pytest.mark.timeout(120)
def test_a_start_that_cannot_work_says_why_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with serving(home, "--backend", "process", str(tmp_path)) as server:
        family = server.family()
        assert server.process.wait(READY_S) == 1
        assert "does not start" in server.text()
        assert not psutil.wait_procs(family, timeout=END_S)[1]
