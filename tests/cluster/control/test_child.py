"""One child process: news, logs, draining, and its end when the parent is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.control.backend import Progress
from cluster.control.child import Child

DEADLINE_S = 30.0
# says that it is up, then waits for SIGTERM (exit 0) or for stdin's end (exit 7)
OBEDIENT = """
import json, os, signal, sys
def drain(*_):
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
print(json.dumps({"listening": "127.0.0.1:1"}), flush=True)
sys.stdin.read()
os._exit(7)
"""
STUBBORN = OBEDIENT.replace("os._exit(0)", "None")


def child_of(code: str, tmp_path: Path) -> Child:
    return Child([sys.executable, "-c", code], log=tmp_path / "logs" / "child.log", env=dict(os.environ))


def wait_until_up(child: Child) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not child.listening and child.exit_code is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.listening


def test_news_are_read_and_everything_is_logged(tmp_path: Path) -> None:
    code = """
import json
print("plain words")
print(json.dumps({"progress": {"stage": "load", "done": 3, "total": 9}}))
print(json.dumps({"failed": "no such model"}))
print("{not json")
raise SystemExit(3)
"""
    child = child_of(code, tmp_path)
    assert child.wait(DEADLINE_S)
    assert child.last_words() == "no such model"
    assert child.progress == Progress(stage="load", done=3, total=9)
    assert child.stop(1.0) == 3
    log = child.log.read_text()
    assert "plain words" in log and "{not json" in log and '"progress"' in log


def test_without_a_reason_the_last_line_is_the_last_word(tmp_path: Path) -> None:
    child = child_of("import sys; print('almost'); sys.exit('it broke')", tmp_path)
    assert child.wait(DEADLINE_S)
    assert child.last_words() == "it broke"
    child.kill()


def test_a_child_that_drains_exits_cleanly_and_one_that_does_not_is_killed(tmp_path: Path) -> None:
    obedient = child_of(OBEDIENT, tmp_path)
    wait_until_up(obedient)
    assert obedient.stop(DEADLINE_S) == 0
    stubborn = child_of(STUBBORN, tmp_path)
    wait_until_up(stubborn)
    assert stubborn.stop(0.1) == -signal.SIGKILL


def test_ctrl_c_does_not_reach_a_child(tmp_path: Path) -> None:
    child = child_of(OBEDIENT, tmp_path)
    wait_until_up(child)
    os.kill(child.pid, signal.SIGINT)
    assert not child.wait(0.2)
    assert child.stop(DEADLINE_S) == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_child_learns_from_its_stdin_that_the_parent_was_killed(tmp_path: Path) -> None:
    parent = f"""
import os, sys, time
from pathlib import Path
from cluster.control.child import Child
child = Child([sys.executable, "-c", {OBEDIENT!r}], log=Path({str(tmp_path / "child.log")!r}), env=dict(os.environ))
while not child.listening:
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        process.kill()
    _, alive = psutil.wait_procs([orphan], timeout=DEADLINE_S)
    assert not alive
