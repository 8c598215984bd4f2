"""The committed figures of the traces and the committed setting."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from cluster.bench.roles.compare import as_loaded, on_machines
from cluster.bench.roles.figures import Requests, figures_of, load_figures
from cluster.bench.roles.processes import ProcessOptions, process_load, sensible_splits
from cluster.bench.roles.setting import ideal_rate, load_setting, replayed_load, shifting_load
from cluster.bench.workload import Arrival


def test_a_drawn_load_has_the_traces_lengths_and_burstiness() -> None:
    figures = load_figures()
    means = {"code": (2048, 28), "conversation": (12_035, 343)}  # of the traces themselves
    for name, (prompt, output) in means.items():
        drawn = figures[name].sample(Random(1), 20.0, 3000.0)
        assert drawn.prompts.mean() == pytest.approx(prompt, rel=0.03)
        assert drawn.outputs.mean() == pytest.approx(output, rel=0.03)
        assert len(drawn.at) == pytest.approx(60_000, rel=0.15)
        assert (np.diff(drawn.at) >= 0).all()
    gaps = np.diff(figures["code"].sample(Random(2), 20.0, 3000.0).at)
    assert gaps.std() / gaps.mean() > 8.0  # 13 in the trace: it comes in bursts


def test_figures_are_those_of_the_trace_they_are_made_of() -> None:
    rng = Random(5)
    trace, at = [], 0.0
    for _ in range(4000):
        at += rng.expovariate(2.0)
        prompt = rng.randrange(10, 1000)
        trace.append(Arrival(at_s=at, prompt_tokens=prompt, output_tokens=prompt // 10 + 1))
    drawn = figures_of("one", "", trace).sample(Random(1), 5.0, 2000.0)
    assert drawn.prompts.mean() == pytest.approx(505, rel=0.05)
    assert np.corrcoef(drawn.prompts, drawn.outputs)[0, 1] > 0.9  # long prompts keep their long answers


def test_timestamps_that_tick_are_spread() -> None:
    trace = [Arrival(at_s=3.0 * (i // 10), prompt_tokens=5, output_tokens=5) for i in range(2000)]
    gaps = figures_of("ticks", "", trace).gaps
    assert gaps[len(gaps) // 2] > 0.3  # not nine gaps of nothing and one of three seconds


def test_each_phase_loads_the_workers_alike_and_by_what_the_file_says() -> None:
    setting = load_setting()
    for phase in setting.phases:
        alone = replace(setting, phases=(phase,), phase_s=20_000.0, rounds=1)
        rate, _ = ideal_rate(setting, shifting_load(alone, load_figures(), 1, 0))
        assert phase.rate / rate == pytest.approx(0.85, abs=0.015)


def test_loads_repeat_by_seed_and_keep_to_the_context() -> None:
    setting = replace(load_setting(), phase_s=20.0)
    one, same, other = (shifting_load(setting, load_figures(), 8, seed) for seed in (1, 1, 2))
    assert (one.at == same.at).all() and (one.prompts == same.prompts).all()
    assert len(one.at) != len(other.at) or (one.at != other.at).any()
    assert (one.prompts + one.outputs <= setting.max_model_len).all()
    assert (np.diff(one.at) >= 0).all() and one.at[-1] < setting.seconds


def test_a_recorded_trace_is_replayed_at_the_rate_of_its_phase() -> None:
    setting = replace(load_setting(), phase_s=100.0)
    trace = Requests(at=np.arange(50) * 2.0, prompts=np.arange(50) + 1, outputs=np.full(50, 7))
    load = replayed_load(setting, [trace, trace], 10)
    for number, phase in enumerate(setting.phases):
        here = (load.at >= number * 100.0) & (load.at < (number + 1) * 100.0)
        assert here.sum() == int(phase.rate * 1000)
    assert (load.outputs == 7).all()


def test_the_real_workers_load_follows_from_its_options() -> None:
    options = ProcessOptions(seed=3, phase_s=30.0)
    arrivals, rates, shares = process_load(options)
    assert arrivals == process_load(options)[0]
    assert all(one.at_s <= other.at_s for one, other in pairwise(arrivals))
    assert max(one.prompt_tokens for one in arrivals) <= options.most_prompt
    early = sum(one.at_s < 30.0 for one in arrivals)
    assert early > len(arrivals) - early  # code comes more often than conversation
    assert rates["code"] > rates["conversation"] and shares["code"] > shares["conversation"]


def test_splits_lie_between_what_the_phases_want() -> None:
    assert sensible_splits({"code": 0.78, "conversation": 0.5}, 5) == [2, 3, 4]
    assert sensible_splits({"code": 0.95, "conversation": 0.05}, 3) == [1, 2]


def test_long_answers_load_the_workers_as_the_short_ones_did() -> None:
    setting = load_setting()
    conversation = setting.phases[1]
    longer = as_loaded(setting, conversation, replace(conversation, longer=6.0))
    assert longer.rate < conversation.rate
    alone = replace(setting, phases=(longer,), phase_s=20_000.0, rounds=1)
    load = shifting_load(alone, load_figures(), 1, 0)
    assert load.outputs.mean() > 4 * 343  # cut at what may be asked for
    assert longer.rate / ideal_rate(setting, load)[0] == pytest.approx(0.85, abs=0.04)


def test_other_machines_are_loaded_alike() -> None:
    setting = load_setting()
    other = on_machines(setting, "h100")
    for phase, committed in zip(other.phases, setting.phases, strict=True):
        assert phase.rate > 2 * committed.rate
        alone = replace(other, phases=(phase,), phase_s=4000.0 / phase.rate, rounds=1)
        rate, _ = ideal_rate(other, shifting_load(alone, load_figures(), 1, 0))
        assert phase.rate / rate == pytest.approx(0.85, abs=0.04)
    with pytest.raises(ValueError, match="l20, h100"):
        on_machines(setting, "abacus")
