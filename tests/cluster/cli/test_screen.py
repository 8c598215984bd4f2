"""What people see of a start, with and without a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.cli.screen import LineScreen, Rates, TerminalScreen, curl_line
from cluster.control.backend import Progress
from cluster.control.controller import Snapshot, WorkerView
from cluster.control.router_client import RouterClient

CLIENT = RouterClient(host="127.0.0.1", port=8180)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def snapshot(doing: str = "workers are starting", done: int = 10**9) -> Snapshot:
    progress = Progress(stage="load", done=done, total=4 * 10**9)
    view = WorkerView(worker_id="decode-0", role="decode", state="starting", progress=progress)
    return Snapshot(doing=doing, ready=False, workers=(view,))


def test_loading_is_told_in_gb_and_gb_per_second_and_warm_up_in_shapes() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert rates.describe("w", Progress(stage="load", done=0, total=4 * 10**9)) == "loading 0 of 4 GB"
    clock.now = 2.0
    assert (
        rates.describe("w", Progress(stage="load", done=3 * 10**9, total=4 * 10**9)) == "loading 3 of 4 GB (1.5 GB/s)"
    )
    assert rates.describe("w", Progress(stage="warmup", done=1, total=8)) == "warming up 1 of 8"


def test_without_a_terminal_there_is_a_line_each_10_s_and_at_each_change() -> None:
    clock, out = Clock(), io.StringIO()
    screen = LineScreen(Console(file=out, width=100), clock)
    for clock.now in (0.0, 1.0, 9.9):
        screen.draw(snapshot())
    assert out.getvalue().count("\n") == 1
    clock.now = 10.1
    screen.draw(snapshot(done=3 * 10**9))
    screen.draw(snapshot("the router is starting"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1] == "neap: workers are starting: decode-0 loading 3 of 4 GB (0.2 GB/s)"


def test_on_a_terminal_the_table_shows_each_worker_and_goes_away() -> None:
    out = io.StringIO()
    screen = TerminalScreen(Console(file=out, force_terminal=True, width=100, legacy_windows=False))
    screen.draw(snapshot())
    assert "decode-0" in out.getvalue()
    screen.close()
    screen.ready(CLIENT, "tiny", ())
    assert "neap is ready" in out.getvalue()


def test_the_ready_box_has_the_endpoint_the_notes_and_a_curl_line_in_one_piece() -> None:
    out = io.StringIO()
    screen = LineScreen(Console(file=out, width=60))
    screen.ready(CLIENT, "tiny", (("Ray dashboard", "http://127.0.0.1:8265"), ("Ray token", "/home/x/.ray/auth_token")))
    lines = out.getvalue().splitlines()
    assert any("http://127.0.0.1:8180/v1" in line for line in lines)
    assert any("Ray token" in line and line.endswith("/home/x/.ray/auth_token") for line in lines)
    assert curl_line(CLIENT, "tiny") in lines


def test_a_key_is_named_but_not_shown_in_the_curl_line() -> None:
    line = curl_line(RouterClient(host="::1", port=1, api_key="secret"), "m")
    assert "secret" not in line
    assert "$NEAP_API_KEY" in line and "http://[::1]:1/" in line
