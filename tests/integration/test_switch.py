"""Roles change under a running `neap serve`: streams keep their text, and a lost prefill worker finds a successor."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.test_serve import Serving, serving

NUM_STREAMS = 4
SOON_S = 60.0  # only there so that a fault of ours ends
OPTIONS: dict[str, Any] = {"max_tokens": 150, "temperature": 0.8}


class Stream(threading.Thread):
    """One streamed answer, read in a thread; `text` grows."""

    def __init__(self, server: Serving, question: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.finished = ""
        self._server = server
        self._options = OPTIONS | {"messages": [{"role": "user", "content": question}], "seed": seed}

    def run(self) -> None:
        with self._server.client() as client:
            model = client.models.list().data[0].id
            for chunk in client.chat.completions.create(model=model, stream=True, **self._options):
                self.text += chunk.choices[0].delta.content or ""
                self.finished = chunk.choices[0].finish_reason or self.finished


def streams(server: Serving) -> list[Stream]:
    return [Stream(server, f"What is tide number {index}?", seed=index) for index in range(NUM_STREAMS)]


def ended(some: list[Stream]) -> list[tuple[str, str]]:
    """Finish reason and text of each, when all have ended."""
    for stream in some:
        stream.join(SOON_S)
    return [(stream.finished, stream.text) for stream in some]


def running(server: Serving) -> dict[str, int]:
    """Requests that run on each decode worker, as its last heartbeat said."""
    with urllib.request.urlopen(f"{server.url}/status", timeout=SOON_S) as response:
        workers = json.load(response)["workers"]
    return {w["worker_id"]: w["load"]["running"] for w in workers if w["role"] == "decode" and w["load"]}


def asked(home: Path, path: str, body: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """What the admin API answers: at once, where `neap switch` takes a moment to start."""
    (note_path,) = (home / ".local" / "state" / "neap").iterdir()
    note = json.loads(note_path.read_text())
    headers = {"authorization": f"Bearer {note['token']}", "content-type": "application/json"}
    request = urllib.request.Request(note["url"] + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=SOON_S) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.timeout(300)
def test_streams_keep_their_text_while_roles_change_and_a_lost_prefill_worker_is_replaced(tmp_path: Path) -> None:
    fake = ["--set", "pools.1.workers=2", "--set", "fake.vocab_size=3072", "--set", "fake.fixed_ms=20"]
    calm = ["--roles-ttft-ms", "60000", "--roles-tpot-ms", "1000"]  # the planner has no other reason to change anything
    with serving(tmp_path, "--backend", "process", *fake, *calm) as server:
        server.wait_until_ready()
        first = streams(server)
        for stream in first:
            stream.start()
        undisturbed = ended(first)
        assert all(reason == "length" and text for reason, text in undisturbed)

        server.until(lambda: not any(running(server).values()), SOON_S)
        again = streams(server)
        for stream in again:
            stream.start()
        server.until(lambda: max(running(server).values()) >= 2, SOON_S)
        worker_id = max(running(server).items(), key=lambda pair: pair[1])[0]
        code, changed = asked(tmp_path, f"/v1/workers/{worker_id}/switch", {"role": "prefill"})
        assert code == 200, f"{changed} {server.text()}"
        assert (changed["outcome"], changed["worker"]["role"]) == ("switched", "prefill")
        assert changed["moved"] + changed["finished_in_place"] >= 2
        other = next(name for name in ("decode-0", "decode-1") if name != worker_id)
        code, refused = asked(tmp_path, f"/v1/workers/{other}/drain", {})
        assert code == 409 and refused["error"]["code"] == "last_decode_worker", f"{refused} {server.text()}"
        assert ended(again) == undisturbed
        assert "is decode now" in server.neap("switch", worker_id, "--to", "decode")
        assert f"{worker_id} to prefill" in server.neap("status", "--why")

        prefill = {w["worker_id"]: w for w in server.status()["workers"]}["prefill-0"]
        psutil.Process(prefill["pid"]).kill()
        server.until(lambda: "no prefill worker is ready" in server.text(), SOON_S)
        roles = {w["worker_id"]: w["role"] for w in server.status()["workers"]}
        assert sorted(roles[name] for name in ("decode-0", "decode-1")) == ["decode", "prefill"]
