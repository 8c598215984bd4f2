"""Loads: the same seed gives the same one; traces are read, scaled and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.workload import LoadOptions, make_load, read_trace

JSONL = """\
{"timestamp": 0, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1200, "output_length": 8, "hash_ids": [0, 2]}
{"timestamp": 4000, "input_length": 90000, "output_length": 5000, "hash_ids": [7]}
"""
CSV = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.9799600,110,27
"""


def test_a_seed_is_a_load() -> None:
    options = LoadOptions(num_requests=50, rate=10.0)
    assert make_load(options) == make_load(options)
    assert make_load(options) != make_load(replace(options, seed=1))
    first, second = make_load(options)[3], make_load(options)[4]
    assert first.token_ids(0, 3) == first.token_ids(0, 3) != second.token_ids(0, 4)
    assert len(first.token_ids(0, 3)) == first.prompt_tokens


def test_a_synthetic_load_has_about_the_rate_and_lengths_asked_for() -> None:
    load = make_load(LoadOptions(num_requests=2000, rate=10.0, prompt_tokens=256, output_tokens=64))
    assert 180 < load[-1].at_s < 220
    assert 240 < sum(arrival.prompt_tokens for arrival in load) / 2000 < 272
    assert 60 < sum(arrival.output_tokens for arrival in load) / 2000 < 68
    assert {a.prompt_tokens for a in make_load(LoadOptions(num_requests=9, spread=0.0))} == {256}


def test_a_trace_of_either_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    (tmp_path / "b.csv").write_text(CSV)
    conversation, code = read_trace(tmp_path / "a.jsonl"), read_trace(tmp_path / "b.csv")
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in conversation[:2]] == [(0, 1100, 50), (3, 1200, 8)]
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in code] == [(0, 4808, 10), (2, 110, 27)]


def test_a_trace_is_scaled_in_rate_and_length_and_cut_to_the_context(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(JSONL)
    load = make_load(LoadOptions(num_requests=3, rate=1.0, trace=str(path), length_scale=0.125, max_tokens=512))
    assert [arrival.at_s for arrival in load] == [0.0, 1.5, 2.0]
    assert [(a.prompt_tokens, a.output_tokens) for a in load[:2]] == [(138, 6), (150, 1)]
    assert load[2].prompt_tokens + load[2].output_tokens == 512
    own_times = make_load(LoadOptions(num_requests=2, rate=0.0, trace=str(path)))
    assert own_times[1].at_s == 3.0


def test_requests_of_a_trace_share_the_blocks_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(JSONL)
    first, second, _ = make_load(LoadOptions(num_requests=3, trace=str(path), length_scale=0.125, max_tokens=512))
    one, two = first.token_ids(0, 0), second.token_ids(0, 1)
    assert one[:64] == two[:64]  # block 0 of 512 tokens, an eighth of it
    assert one[64:128] != two[64:128]


@pytest.mark.parametrize("text", ["", "TIMESTAMP,Other\n2023-11-16 18:17:03,1\n", "TIMESTAMP,ContextTokens\nnever,1\n"])
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.csv"):
        make_load(LoadOptions(trace=str(path)))
