"""Commands and events between network process and rank: order, overtaking, backlog, sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cluster.worker.rank_rings import NetworkEnd, RankEnd, RankFds, RankStuckError
from cluster.worker.rings import MessageTooLargeError, RingFds
from engine.messages import (
    Abort,
    Add,
    Command,
    EndServe,
    NewTokens,
    Reserve,
    Serve,
    Shutdown,
    StepEvents,
)
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs


@dataclass
class Ends:
    network: NetworkEnd
    rank: RankEnd


def _dup(fds: RingFds) -> RingFds:
    return RingFds(memory=os.dup(fds.memory), event=os.dup(fds.event))


@pytest.fixture
def ends() -> Iterator[Ends]:
    network = NetworkEnd(command_bytes=2048, abort_bytes=4096, event_bytes=2048)
    fds = network.fds
    rank = RankEnd(
        RankFds(
            commands=_dup(fds.commands),
            aborts=_dup(fds.aborts),
            events=_dup(fds.events),
            status=os.dup(fds.status),
            parent=fds.parent,
        )
    )
    yield Ends(network, rank)
    rank.close()
    network.close()


def add(request_id: str, prompt: bytes = b"abcd") -> Add:
    return Add(request_id=request_id, prompt=prompt, params=SamplingParams(logit_bias={3: 1.5}, stop=("x",)), seed=5)


def test_commands_arrive_in_the_order_they_were_sent_whatever_their_lane(ends: Ends) -> None:
    commands: list[Command] = [
        add("a"),
        Abort(request_id="a"),
        add("a"),
        Serve(call_id="c", tokens=b"abcd", start=0, end=1),
        EndServe(call_id="c"),
        Shutdown(),
    ]
    for command in commands:
        ends.network.send(command)
    assert ends.rank.receive() == commands
    assert ends.rank.receive() == []


def test_what_does_not_fit_waits_and_an_abort_overtakes_it(ends: Ends) -> None:
    for name in "abcde":
        ends.network.send(add(name, bytes(800)))
    ends.network.send(Abort(request_id="a"))  # in the ring already: it arrives, and is undone there
    ends.network.send(Abort(request_id="e"))  # still waiting: it never arrives
    got = ends.rank.receive()
    assert len(got) == 3  # one fitted
    while ends.network.has_backlog:
        ends.network.flush()
        got += ends.rank.receive()
    assert [command.request_id for command in got if isinstance(command, Add)] == ["a", "b", "c", "d"]
    assert [command for command in got[:3] if isinstance(command, Abort)] == [
        Abort(request_id="a"),
        Abort(request_id="e"),
    ]


def test_aborts_take_pulls_and_served_calls_out_of_the_backlog(ends: Ends) -> None:
    ends.network.send(add("filler", bytes(1500)))
    ends.network.send(Reserve(add=add("r", bytes(800))))
    ends.network.send(Serve(call_id="c", tokens=bytes(800), start=0, end=200))
    ends.network.send(EndServe(call_id="c"))
    ends.network.send(Abort(request_id="r"))
    assert not ends.network.has_backlog
    assert {type(command) for command in ends.rank.receive()} == {Add, EndServe, Abort}


def test_a_command_larger_than_its_ring_is_an_error(ends: Ends) -> None:
    with pytest.raises(MessageTooLargeError):
        ends.network.send(add("a", bytes(4000)))


def test_events_carry_everything(ends: Ends) -> None:
    tokens = NewTokens(
        request_id="a",
        first_position=3,
        token_ids=(1, 2),
        logprobs=(TokenLogprobs(logprob=-0.5, top_ids=(1,), top_logprobs=(-0.5,)),),
        finish_reason=FinishReason.STOP,
        stop_token=2,
    )
    events = StepEvents(step=9, num_tokens=1, tokens=(tokens,))
    ends.rank.send(events, timeout_s=1)
    assert ends.network.receive() == [events]


def test_a_network_process_that_reads_nothing_ends_the_rank_after_a_while(ends: Ends) -> None:
    with pytest.raises(RankStuckError):
        for step in range(1000):
            ends.rank.send(StepEvents(step=step, num_tokens=0), timeout_s=0.01)
