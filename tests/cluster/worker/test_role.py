"""The role machine: which switches are allowed, an epoch at every transition, canaries, timeouts, rollbacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster.types import SwitchReply, SwitchRequest, WorkerInfo
from cluster.worker.effects import Publish, RoleEffect, SendSwitchReply, ToEngine
from cluster.worker.role import RoleMachine, canary_tokens
from engine.config import Role
from engine.messages import (
    Abort,
    Add,
    EndServe,
    NewTokens,
    RoleSet,
    Serve,
    ServeBusy,
    ServeDone,
    ServedPiece,
    SetRole,
    StepEvents,
)
from engine.request import FinishReason

INFO = WorkerInfo(
    worker_id="w",
    incarnation="i" * 32,
    epoch=1,
    role="decode",
    state="starting",
    address="a:1",
    block_size=16,
    max_model_len=512,
    vocab_size=300,
)
TEXT, SUMS = (5, 9), (11, 22, 33)


def events(*replies: Any, tokens: tuple[NewTokens, ...] = ()) -> StepEvents:
    return StepEvents(step=1, num_tokens=1, replies=replies, tokens=tokens)


class Rank:
    """Answers what the machine asks of the rank, as a healthy one does or as it is told to."""

    def __init__(self, info: WorkerInfo = INFO) -> None:
        self.machine = RoleMachine(info)
        self.published: list[WorkerInfo] = []
        self.replies: list[SwitchReply] = []
        self.sent: list[Any] = []
        self.text: tuple[int, ...] = TEXT
        self.sums: tuple[int, ...] = SUMS
        self.silent = False

    def do(self, now: float, effects: list[RoleEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Publish):
                self.published.append(effect.info)
            elif isinstance(effect, SendSwitchReply):
                self.replies.append(effect.reply)
            else:
                assert isinstance(effect, ToEngine)
                self.sent.append(effect.command)
                if not self.silent and (answer := self._answer(effect.command)) is not None:
                    self.do(now, self.machine.on_events(now, answer))

    def _answer(self, command: Any) -> StepEvents | None:
        if isinstance(command, SetRole):
            return events(RoleSet(role=command.role))
        if isinstance(command, Add):
            last = NewTokens(
                request_id=command.request_id,
                first_position=0,
                token_ids=self.text,
                finish_reason=FinishReason.LENGTH,
            )
            return events(tokens=(last,))
        if isinstance(command, Serve):
            piece = ServedPiece(
                call_id=command.call_id, first_block=0, block_ids=(1, 2, 3), checksums=self.sums, end_tokens=35
            )
            return events(piece, ServeDone(call_id=command.call_id))
        return None

    def ask(self, now: float, role: Role | None, **changes: Any) -> None:
        info = self.machine.info
        request = SwitchRequest(incarnation=info.incarnation, expected_epoch=info.epoch, role=role)
        self.do(now, self.machine.on_switch(now, "call", replace(request, **changes)))

    def quiet(self, now: float) -> None:
        self.do(now, self.machine.on_quiet(now))


def ready() -> Rank:
    rank = Rank()
    rank.do(0.0, rank.machine.begin(0.0))
    assert rank.machine.info.state == "ready"
    rank.published.clear()
    rank.sent.clear()
    return rank


def test_both_canaries_are_learnt_before_the_first_ready_and_leave_nothing() -> None:
    rank = Rank()
    rank.do(0.0, rank.machine.begin(0.0))
    assert [type(command) for command in rank.sent] == [Serve, EndServe, Add]
    assert [(info.state, info.epoch) for info in rank.published] == [("ready", 1)]
    assert rank.machine.next_timer() is None


def test_a_switch_goes_through_every_state_with_an_epoch_each() -> None:
    rank = ready()
    rank.ask(1.0, "prefill")
    assert rank.machine.leaving == "decode" and rank.replies == []
    rank.quiet(1.25)
    states = [(info.state, info.role, info.epoch) for info in rank.published]
    assert states == [
        ("draining", "decode", 2),
        ("switching", "decode", 3),
        ("verifying", "decode", 4),
        ("ready", "prefill", 5),
    ]
    assert rank.sent[0] == SetRole(role="prefill")
    (reply,) = rank.replies
    assert (reply.outcome, reply.duration_ms, reply.info.epoch) == ("switched", 250.0, 5)
    assert rank.machine.next_timer() is None and rank.machine.leaving is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"incarnation": "x"}, "not x"),
        ({"expected_epoch": 0}, "epoch is 1"),
        ({"expected_epoch": 2}, "epoch is 1"),
        ({"role": "decode"}, "already"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(changes: dict[str, Any], words: str) -> None:
    rank = ready()
    rank.ask(1.0, **{"role": "prefill", **changes})
    (reply,) = rank.replies
    assert reply.outcome == "refused" and words in reply.reason
    assert rank.machine.info.epoch == 1 and rank.published == [] and rank.sent == []


def test_while_one_switch_is_under_way_another_is_refused() -> None:
    rank = ready()
    rank.ask(1.0, "prefill")
    rank.ask(1.1, "prefill")
    assert [reply.outcome for reply in rank.replies] == ["refused"]
    rank.quiet(1.2)
    assert [reply.outcome for reply in rank.replies] == ["refused", "switched"]


@pytest.mark.parametrize("wrong", [(), (1, 2), (5, 9, 1)])
def test_a_wrong_canary_text_brings_back_prefill(wrong: tuple[int, ...]) -> None:
    rank = ready()
    rank.ask(1.0, "prefill")
    rank.quiet(1.0)
    rank.text = wrong
    rank.ask(2.0, "decode")
    rank.quiet(2.0)
    assert rank.replies[-1].outcome == "rolled_back"
    assert (rank.machine.info.role, rank.machine.info.state, rank.machine.info.epoch) == ("prefill", "ready", 9)
    assert rank.sent[-1] == SetRole(role="prefill")


def test_wrong_checksums_of_the_served_canary_bring_back_decode() -> None:
    rank = ready()
    rank.sums = (11, 22, 34)
    rank.ask(1.0, "prefill")
    rank.quiet(1.0)
    assert rank.replies[-1].outcome == "rolled_back" and rank.machine.info.role == "decode"
    assert EndServe(call_id="c:3") in rank.sent


def test_a_canary_that_finds_no_room_is_no_proof() -> None:
    rank = ready()
    rank.silent = True
    rank.ask(1.0, "prefill")
    rank.quiet(1.0)
    rank.do(1.0, rank.machine.on_events(1.0, events(RoleSet(role="prefill"))))
    rank.do(1.0, rank.machine.on_events(1.0, events(ServeBusy(call_id="c:3"))))
    assert rank.replies[-1].outcome == "rolled_back"


@pytest.mark.parametrize("phase", ["draining", "switching", "verifying"])
def test_in_every_phase_a_timeout_brings_the_old_role_back(phase: str) -> None:
    rank = ready()
    rank.silent = True
    rank.ask(1.0, "prefill", timeout_ms=500)
    if phase != "draining":
        rank.quiet(1.1)
    if phase == "verifying":
        rank.do(1.2, rank.machine.on_events(1.2, events(RoleSet(role="prefill"))))
    assert rank.machine.info.state == phase and rank.machine.next_timer() is not None
    rank.do(1.5, rank.machine.on_timer(1.5))
    (reply,) = rank.replies
    assert (reply.outcome, reply.info.role, reply.info.state) == ("rolled_back", "decode", "ready")
    assert (SetRole(role="decode") in rank.sent) == (phase != "draining")
    late = events(RoleSet(role="prefill"), ServeDone(call_id="c:3"))
    assert rank.machine.on_events(1.6, late) == [], "late answers change nothing"


def test_a_drain_stays_until_a_switch_brings_it_back() -> None:
    rank = ready()
    rank.ask(1.0, None)
    assert rank.machine.gives_all_away
    rank.quiet(1.1)
    assert (rank.replies[-1].outcome, rank.machine.info.state) == ("drained", "draining")
    assert rank.machine.leaving is None and rank.machine.next_timer() is None
    rank.ask(9.0, None)
    assert rank.replies[-1].outcome == "refused"
    rank.ask(9.0, "decode")
    assert rank.machine.leaving == "decode", "asked again whether anything is left"
    rank.quiet(9.0)
    assert (rank.replies[-1].outcome, rank.machine.info.state) == ("switched", "ready")


def test_a_worker_that_shuts_down_gives_up_its_switch() -> None:
    rank = ready()
    rank.silent = True
    rank.ask(1.0, "prefill")
    rank.quiet(1.0)
    rank.do(1.1, rank.machine.retire(1.1))
    assert rank.replies[-1].outcome == "rolled_back" and rank.machine.info.state == "draining"
    rank.ask(1.2, "prefill")
    assert rank.replies[-1].outcome == "refused"


def test_a_rank_that_answers_no_canary_at_start_never_switches() -> None:
    rank = Rank()
    rank.silent = True
    rank.do(0.0, rank.machine.begin(0.0))
    at = rank.machine.next_timer()
    assert at is not None
    rank.do(at, rank.machine.on_timer(at))
    assert rank.machine.info.state == "ready" and EndServe(call_id="c:1") in rank.sent
    rank.ask(at, "prefill")
    assert rank.replies[-1].outcome == "refused" and "canary" in rank.replies[-1].reason


def test_the_canary_fits_small_contexts_and_vocabularies() -> None:
    small = replace(INFO, max_model_len=8, vocab_size=3)
    ids = np.frombuffer(canary_tokens(small), dtype="<i4")
    assert 2 <= len(ids) <= 6 and 0 <= ids.min() and ids.max() < 3


@given(st.lists(st.sampled_from(["ask", "drain", "quiet", "timer", "silent", "retire"]), max_size=30))
def test_whatever_happens_epochs_grow_by_one_and_every_ask_has_one_reply(actions: list[str]) -> None:
    rank, now, asked = ready(), 1.0, 0
    for action in actions:
        now += 0.1
        if action in ("ask", "drain"):
            asked += 1
            to: Role = "prefill" if rank.machine.info.role == "decode" else "decode"
            rank.ask(now, to if action == "ask" else None)
        elif action == "quiet" and rank.machine.leaving is not None:
            rank.quiet(now)
        elif action == "timer" and (at := rank.machine.next_timer()) is not None:
            now = max(now, at)
            rank.do(now, rank.machine.on_timer(now))
        elif action == "silent":
            rank.silent = not rank.silent
        elif action == "retire":
            rank.do(now, rank.machine.retire(now))
    if (at := rank.machine.next_timer()) is not None:
        rank.do(at, rank.machine.on_timer(at))
    assert [info.epoch for info in rank.published] == list(range(2, 2 + len(rank.published)))
    assert len(rank.replies) == asked
    ended = [command.request_id for command in rank.sent if isinstance(command, Abort)]
    assert len(ended) == len(set(ended))
