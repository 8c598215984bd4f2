"""Failpoints: which effect reaches which point, the N-th time only, and nothing without one."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import get_args

import pytest
from msgspec.structs import replace

from cluster.config.model import ClusterConfig
from cluster.spec import WorkerSpec
from cluster.types import FetchAccepted, FetchOfferedAll, Piece, WorkerInfo
from cluster.worker.effects import Effect, EndCall, Publish, SendFetch, ToEngine
from cluster.worker.failpoints import MID_CHUNK_S, Failpoint, Point, point_after, point_before
from cluster.worker.service import WorkerService
from engine.config import EngineConfig
from engine.messages import Commit, Serve

INFO = WorkerInfo(worker_id="w", incarnation="i", epoch=1, role="decode", state="ready", address="")
PIECE = Piece(
    call_id="c",
    source_incarnation="i",
    index=0,
    first_block=0,
    end_tokens=16,
    num_layers=1,
    dtype="uint8",
    shape=(1,),
    checksum_algorithm="xxh3_64",
    checksums=(1,),
)
COMMIT: Effect = ToEngine(command=Commit(request_id="d:r", first_block=0, checksums=(1,)))
SEND_PIECE: Effect = SendFetch(call_id="c", reply=PIECE)


def accepted(cached: int) -> Effect:
    return SendFetch(
        call_id="c", reply=FetchAccepted(cached_tokens=cached, end_tokens=100, queue_ms=0, transport="grpc")
    )


def serve(call_id: str) -> Effect:
    return ToEngine(command=Serve(call_id=call_id, tokens=b"", start=0, end=0))


@pytest.mark.parametrize(
    "effect, before, after",
    [
        (COMMIT, "before_commit", "after_commit"),
        (SEND_PIECE, "between_pieces", None),
        (serve("p:1"), None, "queued"),
        (serve("c:1"), None, None),
        (accepted(0), None, "mid_chunk"),
        (accepted(100), None, None),
        (SendFetch(call_id="c", reply=FetchOfferedAll()), None, None),
        (EndCall(call_id="c"), None, None),
        *((Publish(info=replace(INFO, state=state)), None, state) for state in ("draining", "switching", "verifying")),
    ],
)
def test_each_effect_reaches_its_points(effect: Effect, before: Point | None, after: Point | None) -> None:
    assert (point_before(effect), point_after(effect)) == (before, after)


class Strikes:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: self.seen.append((pid, number)))


@pytest.fixture
def strikes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    return Strikes(monkeypatch).seen


def test_it_strikes_itself_once_the_nth_time_before_or_after_the_effect(strikes: list[tuple[int, int]]) -> None:
    done: list[int] = []
    for point, num_done in (("before_commit", 1), ("after_commit", 2)):
        strikes.clear()
        done.clear()
        for effect in Failpoint(f"{point}:2:SIGKILL").watch([SEND_PIECE, COMMIT, SEND_PIECE, COMMIT, COMMIT]):
            if effect is COMMIT:
                if not strikes:
                    done.append(1)
                elif len(done) == num_done:
                    done.append(0)
        assert strikes == [(os.getpid(), signal.SIGKILL)] and sum(done) == num_done


def test_mid_chunk_lets_the_acceptance_leave_first(strikes: list[tuple[int, int]]) -> None:
    async def run() -> None:
        assert list(Failpoint("mid_chunk:1:SIGSTOP").watch([accepted(0)])) == [accepted(0)]
        assert strikes == []
        await asyncio.sleep(2 * MID_CHUNK_S)
        assert strikes == [(os.getpid(), signal.SIGSTOP)]

    asyncio.run(run())


@pytest.mark.parametrize("text", ["queued", "queued:1", "queued:x:SIGKILL", "nowhere:1:SIGKILL", "queued:1:BOOM"])
def test_a_failpoint_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME:N:SIGNAL"):
        Failpoint(text)


def test_nothing_is_armed_by_default_and_no_option_arms_it() -> None:
    spec = WorkerSpec(worker_id="w", pool="p", role="decode", engine=EngineConfig(model="fake"))
    assert spec.failpoint == ""
    assert "failpoint" not in str(ClusterConfig.model_json_schema())

    async def build() -> WorkerService:
        return WorkerService(spec, on_state=print, on_progress=print, on_dead=print)

    assert asyncio.run(build())._failpoint is None
    assert {"queued", "mid_chunk", "between_pieces", "before_commit", "after_commit"} <= set(get_args(Point))
