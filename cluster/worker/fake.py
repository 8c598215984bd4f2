"""The exact fake that a spec asks for; apart from rank.py, so that its oracle can be had without an engine."""

from __future__ import annotations

from dataclasses import replace

from cluster.spec import FakeSpec
from engine.config import EngineConfig
from engine.fake_engine import FakeConfig, FakeModel
from engine.scheduler.step_cost import StepCost

_SPECIAL_TOKENS = 3  # pad, bos, eos: never drawn


def fake_config(engine: EngineConfig, fake: FakeSpec) -> FakeConfig:
    """Its oracle is `.model`."""
    return FakeConfig(
        engine=replace(engine, max_model_len=fake.max_model_len, block_size=fake.block_size),
        model=FakeModel(
            vocab_size=fake.vocab_size,
            vocabulary=range(_SPECIAL_TOKENS, fake.vocab_size),
            stop_probability=fake.stop_probability,
        ),
        speed=StepCost(fixed_ms=fake.fixed_ms, ms_per_token=fake.ms_per_token),
        num_blocks=fake.num_blocks,
    )
