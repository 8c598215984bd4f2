"""One test per row of the (stage x event) table in cluster/worker/README.md, on the virtual clock, exact fake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

import cluster.worker
from cluster.sim.cluster import SimCluster
from cluster.sim.router import SimResult
from cluster.sim.workload import cluster as make_cluster
from cluster.sim.workload import fake, submit, tokens
from cluster.types import FetchBusy, FetchRefused
from tests.cluster.sim.switching import ask, switch

README = Path(cluster.worker.__file__).parent / "README.md"
COLUMNS = ("stage", "event", "who frees what", "messages", "client", "path")
FREED_WITHIN_S = 1.0
FOUND_WITHIN_S = 3.0
STALL_S = 6.0
LATE_COPY_S = 5.0
LONG_STALL_S = 20.0
MOVE_COPY_S = 0.2

# what a word in the column "messages" looks like in the journal: who, and with which words
EVIDENCE: dict[str, tuple[str, tuple[str, ...]]] = {
    "Abort (link)": ("router-1", ("ToWorker decode-1 AbortRequest target",)),
    "Abort (rank)": ("decode-1", ("ToEngine Abort d:target",)),
    "OpenFetch": ("decode-1", ("OpenFetch", "d:target")),
    "CloseFetch": ("decode-1", ("CloseFetch d:target",)),
    "PullClosed(": ("decode-1", ("ToEngine PullClosed d:target",)),
    "EndServe": ("prefill-1", ("ToEngine EndServe d:target",)),
    "Dispatch (attempt 2": ("router-1", ("Dispatch target/2",)),
    "DropLink": ("router-1", ("DropLink decode-1",)),
    "Failed busy": ("decode-1", ("Failed target busy",)),
    "NoSpace": ("decode-1", ("ToEngine Reserve d:target",)),
    "Moved": ("decode-1", ("Moved target",)),
    "Pause": ("decode-1", ("ToEngine Pause d:target",)),
    "Dispatch (attempt 3": ("router-1", ("Dispatch target/3",)),
    "Release": ("router-1", ("Release target",)),
    "Abort (old rank)": ("decode-1", ("ToEngine Abort d:target",)),
}
# of rows of the stage "moved", whose decode worker is the second one
MOVED_EVIDENCE = {
    "Abort (link)": ("router-1", ("ToWorker decode-2 AbortRequest target",)),
    "CloseFetch": ("decode-2", ("CloseFetch d:target",)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    event: str
    messages: str
    client: str
    path: str


def read_table() -> list[Row]:
    """The rows, as the README has them."""
    lines = [line.strip() for line in README.read_text().splitlines()]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    start = cells.index(list(COLUMNS))
    rows = [Row(row[0], row[1], row[3], row[4], row[5]) for row in cells[start + 2 :] if len(row) == len(COLUMNS)]
    assert len(rows) == len({(row.stage, row.event) for row in rows}), "a (stage, event) pair has two rows"
    return rows


class Scenario:
    """A cluster with one request, "target", that is brought to a stage. Background requests make it wait there."""

    def __init__(self, row: Row, *, source_host: str, deadline: float = 1000.0) -> None:
        self.row = row
        crowded = row.stage == "waiting for row"
        full = row.stage == "waiting for space"
        engine = fake(
            max_num_seqs=2 if crowded else 8,
            num_blocks=64 if full else 256,
            fixed_ms=30.0 if row.event == "no space for long" else 1.0,
            ms_per_token=0.3,
            max_step_ms=50.0 if full else 20.0,
        )
        moved = row.stage == "moved"
        names = ("prefill-1", "decode-1", "decode-2") if moved else ()
        hosts = {"prefill-1": source_host, **({"decode-1": source_host} if moved else {})}
        self.sim = make_cluster(*names, engine=engine, seed=5, hosts=hosts)
        self.background: list[str] = []
        self.num_before = 0  # journal entries before the event
        self._rng = Random(17)
        self.target = submit(
            "target", tokens(self._rng, 560 if full else 200), max_tokens=200 if moved else 24, deadline=deadline
        )
        self._prepare()

    @property
    def result(self) -> SimResult:
        """What the target's client got."""
        return self.sim.results["target"]

    def _prepare(self) -> None:
        sim, stage = self.sim, self.row.stage
        if stage == "waiting for row":
            for _ in range(2):
                self._add_background(40, max_tokens=400)
            sim.run_for(0.1)
        elif stage == "waiting for source":
            self._add_background(1500, max_tokens=4)
            sim.run_for(0.01)
        elif stage == "moved":
            switch(sim, "decode-2", None)  # so that the target goes to decode-1
            sim.run_for(0.1)
        elif stage == "waiting for space":
            name = self._add_background(480, max_tokens=400 if self.row.event == "no space for long" else 100)
            assert sim.run_while(lambda: not sim.results[name].outputs, limit_s=5)
        if self.row.event.startswith("late copy"):
            sim.faults.copy_s = lambda _, piece: LATE_COPY_S if piece.index == 0 else None
        elif stage == "copying":
            sim.faults.copy_s = lambda _, piece: 0.005

    def _add_background(self, num_tokens: int, *, max_tokens: int) -> str:
        name = f"background-{len(self.background)}"
        self.background.append(name)
        self.sim.router.submit(submit(name, tokens(self._rng, num_tokens), max_tokens=max_tokens))
        return name

    def reach(self) -> float:
        """Submit the target and run until it is at the stage. Returns when that was."""
        self.begin()
        assert self.sim.run_while(lambda: not self._at_stage(), limit_s=20), f"never {self.row.stage}"
        return self.sim.clock.now

    def begin(self) -> None:
        """Submit the target, on its way to the stage."""
        self.sim.router.submit(self.target)
        if self.row.stage == "moved":
            self._give_away()

    def _give_away(self) -> None:
        """decode-1 gives the running target away, decode-2 is back and takes it."""
        sim = self.sim
        assert sim.run_while(lambda: len(self.result.outputs.get(0, [])) < 5, limit_s=20)
        ask(sim, "decode-2", "decode")
        sim.faults.copy_s = lambda *_: MOVE_COPY_S
        ask(sim, "decode-1", None)

    def _at_stage(self) -> bool:
        sim, said = self.sim, self.sim.journal.has
        decode = sim.workers["decode-1"].decode
        match self.row.stage:
            case "waiting for row":
                landed = said("decode-1", "ToEngine PullClosed d:target")
                return landed and sim.workers["decode-1"].core.load().num_waiting == 1
            case "probing":
                return said("decode-1", "ToEngine Probe d:target")
            case "waiting for source":
                return sim.workers["prefill-1"].core.load().num_served == 2
            case "waiting for space":
                return decode.counters["no_space"] > 0
            case "pulling":
                return said("decode-1", "SendTaken d:target")
            case "copying":
                return said("decode-1", "StartCopy")
            case "first token":
                return said("decode-1", "ToEngine PullClosed d:target")
            case "streaming":
                return len(self.result.outputs.get(0, [])) >= 5
            case "last token":
                return said("decode-1", "Tokens target", "length")
            case "moved":
                return said("decode-2", "StartCopy")
            case "done":
                return self.result.ended_at is not None
        raise AssertionError(f"unknown stage {self.row.stage}")

    def end_background(self) -> None:
        """Whatever made the target wait goes away, unless the row is about that."""
        if not self.row.event.startswith("no space"):
            for name in self.background:
                self.sim.router.cancel(name)


def _corrupt(sim: SimCluster) -> None:
    sim.faults.corrupt = lambda _, piece: piece.index >= 1


def _answer(sim: SimCluster, busy: bool) -> None:
    refused = FetchRefused(code="state", message="no")
    sim.faults.answer = lambda _, call: FetchBusy(retry_ms=1) if busy else refused


def _drain(sim: SimCluster) -> None:
    """Give everything away, and come back after a while."""
    ask(sim, "decode-1", None)
    sim.clock.after(0.5, lambda: ask(sim, "decode-1", "decode"))


EVENTS: dict[str, Callable[[SimCluster], None]] = {
    "client abort": lambda sim: sim.router.cancel("target"),
    "deadline": lambda sim: None,  # it was submitted with one
    "link broken": lambda sim: sim.router.break_link("decode-1"),
    "router dies": lambda sim: sim.kill_router(),
    "D dies": lambda sim: sim.kill_worker("decode-1", restart_after_s=0.5),
    "D stalls": lambda sim: sim.freeze_worker("decode-1", LONG_STALL_S),
    "D drains": _drain,
    "old D dies": lambda sim: sim.kill_worker("decode-1"),
    "new D dies": lambda sim: sim.kill_worker("decode-2", restart_after_s=0.5),
    "link to old D broken": lambda sim: sim.router.break_link("decode-1"),
    "source dies": lambda sim: sim.kill_worker("prefill-1"),
    "source stalls": lambda sim: sim.freeze_worker("prefill-1", STALL_S),
    "source busy": lambda sim: _answer(sim, True),
    "source refused": lambda sim: _answer(sim, False),
    "checksum mismatch": _corrupt,
    "late copy": lambda sim: None,  # its time was set before it started
    "no space": lambda sim: None,
    "no space for long": lambda sim: None,
}
ROWS = read_table()


def run_row(row: Row, source_host: str = "host-1") -> tuple[Scenario, float]:
    """Bring the target to the row's stage, let the event happen. Returns the scenario and the event's time."""
    event = row.event.removeprefix("late copy, ")
    scenario = Scenario(row, source_host=source_host)
    at = scenario.reach()
    if event == "deadline":
        scenario = Scenario(
            row, source_host=source_host, deadline=at + 1e-6
        )  # the same seed: the same stage at the same time
        scenario.begin()
        scenario.sim.run_until(at)
    assert event in ("link broken", "late copy") or row.stage == "done" or scenario.result.live
    scenario.num_before = len(scenario.sim.journal.entries)
    EVENTS[event](scenario.sim)
    scenario.end_background()
    return scenario, at


def check_client(scenario: Scenario) -> None:
    """The client has what the row says."""
    row, result, sim = scenario.row, scenario.result, scenario.sim
    expected = sim.oracle(scenario.target)
    if row.client == "text":
        assert result.code is None and result.ended_at is not None, f"it ended with {result.code}"
        assert result.outputs == expected
    elif row.client == "nothing":
        assert result.ended_at is None
    else:
        assert f"error {result.code}" == row.client
    for choice, outputs in result.outputs.items():
        assert outputs == expected[choice][: len(outputs)]
    if row.path != "-":
        assert result.paths == [row.path]


def check_messages(scenario: Scenario) -> None:
    """Every message that the row names was sent after the event, and none if it says none."""
    row = scenario.row
    since = [(who, what) for _, who, what in scenario.sim.journal.entries[scenario.num_before :]]
    evidence = {**EVIDENCE, **MOVED_EVIDENCE} if row.stage == "moved" else EVIDENCE
    for word, (who, words) in evidence.items():
        seen = any(actor == who and all(part in what for part in words) for actor, what in since)
        if word in row.messages:
            assert seen, f"{word} was not sent"
        elif row.messages == "none" and word != "PullClosed(":
            assert not seen, f"{word} was sent"


@pytest.mark.parametrize("source_host", ["host-1", "host-2"], ids=["local", "grpc"])
@pytest.mark.parametrize("row", ROWS, ids=[f"{row.stage}-{row.event}".replace(" ", "_") for row in ROWS])
def test_row(row: Row, source_host: str) -> None:
    """On the decode worker's host the source is read in place ("local"), from another its pieces carry the bytes."""
    scenario, at = run_row(row, source_host)
    sim = scenario.sim
    ends_here = row.client != "text" and "stalls" not in row.event
    if not ends_here:
        assert sim.run_while(lambda: scenario.result.live, limit_s=60), "it never ends"
        if row.event == "source stalls":
            sim.run_until(max(sim.clock.now, at + STALL_S))
        elif row.event == "D stalls":
            sim.run_until(max(sim.clock.now, at + LONG_STALL_S))
    sim.run_for(FREED_WITHIN_S)
    if row.event.startswith("late copy, ") and sim.clock.now < at + LATE_COPY_S:
        check_quarantine(sim, at)
    elif row.event == "router dies":
        assert not [leak for leak in sim.leaks() if not leak.startswith("router")]
    else:
        assert not sim.leaks()
    check_client(scenario)
    check_messages(scenario)


def check_quarantine(sim: SimCluster, at: float) -> None:
    """Nothing is referenced; what a late copy may still write is in quarantine, until the copy has reported."""
    assert sim.live_worker("prefill-1") is None or sim.num_held_blocks("prefill-1")[0] == 0
    referenced, quarantined = sim.num_held_blocks("decode-1")
    assert referenced == 0 and quarantined > 0
    sim.run_until(at + LATE_COPY_S + 0.1)
    assert not sim.leaks()


@pytest.mark.parametrize("row", [row for row in ROWS if "stalls" in row.event], ids=lambda row: row.stage)
def test_stall_is_found_within_3_s(row: Row) -> None:
    if row.event == "source stalls" and row.stage in ("waiting for row", "first token", "streaming"):
        return  # the source has nothing to do with the request any more
    scenario, at = run_row(row)
    who, word = ("router-1", "DropLink decode-1") if row.event == "D stalls" else ("decode-1", "CloseFetch d:target")

    def found() -> bool:
        return any(when >= at and actor == who and word in what for when, actor, what in scenario.sim.journal.entries)

    assert scenario.sim.run_while(lambda: not found(), limit_s=FOUND_WITHIN_S)


def test_table_covers_every_reachable_pair() -> None:
    """The stages that the issue names, each with the client leaving; and every event that this harness knows."""
    stages = {row.stage for row in ROWS if row.event == "client abort"}
    assert stages >= {
        "waiting for row",
        "waiting for source",
        "copying",
        "first token",
        "streaming",
        "last token",
        "done",
    }
    assert {row.event.removeprefix("late copy, ") for row in ROWS} == set(EVENTS)


def test_table_in_readme_is_regular() -> None:
    assert len(ROWS) > 60
    for row in ROWS:
        assert row.client in ("text", "nothing") or row.client.startswith("error ")
