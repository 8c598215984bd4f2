"""The rank process: one engine, stepped as fast as it has work; `python -m cluster.worker.rank SPEC.json`.

    1. die with the parent (PDEATHSIG, and a pipe that a thread watches for EOF); leave signals to the parent
    2. build the engine: RankProgress* then RankReady
    3. until Shutdown: commands -> EngineCore.step() -> one or two StepEvents; asleep while there is nothing to do
    4. any exception: RankFailed, exit code 1
Nothing here waits for the network: an event that does not fit for EVENT_TIMEOUT_S ends the rank.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep

import msgspec

from cluster.spec import FakeSpec
from cluster.worker.fake import fake_config
from cluster.worker.lifeline import die_with_parent, watch_pipe
from cluster.worker.rank_rings import RankEnd, RankSpec
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake_engine import build_fake_engine
from engine.kv.memory import KVMemory
from engine.messages import RankFailed, RankProgress, RankReady
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.profile import StepTimes, alike

_log = logging.getLogger(__name__)
EVENT_TIMEOUT_S = 60.0
IDLE_POLL_S = 1.0
STALLED_POLL_S = 0.002  # work, but nothing to schedule: only a command or time changes that


@dataclass(frozen=True, kw_only=True)
class RunningEngine:
    """An engine as the loop needs it. `memory` stays open as long as the rank lives."""

    core: EngineCore
    memory: KVMemory | None
    ready: RankReady


def main(argument: str) -> int:
    """Run a rank; `argument` is a RankSpec as JSON. Returns the exit code."""
    spec = msgspec.json.decode(argument, type=RankSpec)
    _hold_on_to_parent(spec)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(name)s: %(message)s")
    end = RankEnd(spec.fds)
    try:
        engine = _build(spec, end)
        engine.core.scheduler.blocks.cache.record_changes()
        end.send(engine.ready, timeout_s=EVENT_TIMEOUT_S)
        _run(engine.core, end, StepTimes(engine.ready.profile), spec.engine.steps_in_flight)
    except ValueError as error:  # options and checkpoints: the message says it all
        _log.error("%s", error)
        return _fail(end, str(error))
    except Exception as error:
        _log.exception("the rank failed")
        return _fail(end, f"{type(error).__name__}: {error}")
    return 0


def _fail(end: RankEnd, message: str) -> int:
    try:
        end.send(RankFailed(message=message[:2000]), timeout_s=1.0)
    except Exception:
        _log.exception("nobody hears of it")
    return 1


def _hold_on_to_parent(spec: RankSpec) -> None:
    die_with_parent()
    if os.getppid() != spec.parent_pid:
        os._exit(1)
    watch_pipe(spec.fds.parent, lambda: os._exit(1))  # at once, whatever the engine does at that moment


def _build(spec: RankSpec, end: RankEnd) -> RunningEngine:
    if spec.fake is not None:
        return _build_fake(spec.engine, spec.fake)
    from engine.engine import build_engine  # loads torch, which the fake does without

    def progress(stage: str, done: int, total: int) -> None:
        end.send(RankProgress(stage=stage, done=done, total=total), timeout_s=EVENT_TIMEOUT_S)

    built = build_engine(spec.engine, progress=progress)
    layout, memory = built.layout, built.memory
    ready = RankReady(
        kv_path=memory.path if memory else "",
        kv_nonce=memory.nonce if memory else b"",
        num_blocks=layout.num_blocks,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        block_size=layout.block_size,
        head_dim=layout.head_dim,
        kv_dtype=layout.dtype,
        identity=built.identity,
        numerics_class=built.numerics_class,
        checksum_algorithm=built.checksum_algorithm,
        max_model_len=built.max_model_len,
        max_num_seqs=spec.engine.max_num_seqs,
        vocab_size=built.model_config.vocab_size,
        eos_token_ids=tuple(built.model_config.eos_token_ids),
        profile=built.measure_profile(spec.engine),
    )
    return RunningEngine(core=built.core, memory=memory, ready=ready)


def _build_fake(engine: EngineConfig, fake: FakeSpec) -> RunningEngine:
    config = fake_config(engine, fake)
    memory = KVMemory.create(config.layout)
    core = build_fake_engine(config, memory=memory, sleep=sleep)
    ready = RankReady(
        kv_path=memory.path,
        kv_nonce=memory.nonce,
        num_blocks=config.layout.num_blocks,
        num_layers=config.layout.num_layers,
        num_kv_heads=config.layout.num_kv_heads,
        block_size=config.layout.block_size,
        head_dim=config.layout.head_dim,
        kv_dtype=config.layout.dtype,
        identity=config.model.identity,
        numerics_class="fake",
        checksum_algorithm=core.runner.checksum_algorithm,
        max_model_len=config.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        vocab_size=config.model.vocab_size,
        eos_token_ids=(config.model.eos_token_id,),
        profile=config.profile,
    )
    return RunningEngine(core=core, memory=memory, ready=ready)


def _run(core: EngineCore, end: RankEnd, times: StepTimes, steps_in_flight: int) -> None:
    before: ScheduledBatch | None = None
    while not core.shutdown_asked:
        for command in end.receive():
            core.submit(command)
        if not core.has_work:
            end.wait(IDLE_POLL_S)
            continue
        end.status.begin_step()
        started_s = perf_counter()
        events = core.step(partial(end.send, timeout_s=EVENT_TIMEOUT_S))
        end.status.end_step()
        batch = core.last_batch
        # with a step in flight, what was waited for is the step before: it teaches nothing unless it was the like
        if batch is not None and (not steps_in_flight or (before is not None and alike(before, batch))):
            times.observe(batch, (perf_counter() - started_s) * 1000)
            core.scheduler.scales = times.scales
        before = batch
        if events is None:
            end.wait(STALLED_POLL_S)
        else:
            end.send(events, timeout_s=EVENT_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
