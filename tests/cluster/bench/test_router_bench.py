"""The router bench at small size on a real cluster of processes, and that it finds what is wrong."""

from __future__ import annotations

from pathlib import Path

from cluster.bench.own_cluster import fake_spec
from cluster.bench.prompts import FakePrompts, Prompt
from cluster.bench.router_bench import RouterBenchOptions, bench_router, summarise
from cluster.bench.stream import Reply
from cluster.bench.words import VOCAB_SIZE, words, write_checkpoint
from engine.text.tokenizer import Tokenizer
from tests.cluster.bench.conftest import DONE, HEAD, chunked, token


def reply(*texts: str) -> Reply:
    raw = HEAD + chunked(*(token(text) for text in texts), DONE) + b"0\r\n\r\n"
    return Reply(status=200, num_events=len(texts), first_s=0.1, last_s=0.2, num_reads=1, raw=raw)


def test_a_small_run_has_every_figure_and_no_failure() -> None:
    options = RouterBenchOptions(
        requests=24, concurrency=8, tokens=8, crowd=16, low_requests=4, endpoint="completions", step_ms=0.5
    )
    figures = bench_router(options)
    for name, num_requests in (("throughput", 24), ("crowd", 16), ("low_load", 4)):
        scenario = figures[name]
        assert (scenario["requests"], scenario["failures"]) == (num_requests, {}), scenario
        assert scenario["texts_checked"] == -(-num_requests // 8)
        assert scenario["requests_per_s"] > 0 and scenario["ttft_p50_ms"] > 0
        assert {"router", "worker", "rank", "generator"} <= set(scenario["cpu_ms_per_request"])
    assert figures["options"]["seed"] == 0
    assert {"overhead_ttft_p50_ms", "overhead_e2e_p50_ms", "engine_e2e_p50_ms"} <= set(figures["low_load"])


def test_a_wrong_text_and_a_missing_event_are_found() -> None:
    prompt = Prompt(path="", body={}, pieces=("a", "b"))
    unchecked = Prompt(path="", body={}, pieces=())
    asked = [prompt, prompt, prompt, prompt, unchecked]
    replies = [reply("a", "b"), reply("a", "c"), reply("ab"), reply("ab", ""), reply("x", "y")]
    figures = summarise(replies, asked, 2, 1.0)
    assert figures["failures"] == {"wrong text": 2, "wrong number of events": 1}
    assert (figures["texts_checked"], figures["requests_per_s"]) == (3, 2.0)


def test_every_token_of_the_vocabulary_is_text_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == VOCAB_SIZE
    pieces = [tokenizer.decode([token]) for token in range(3, VOCAB_SIZE)]
    assert all(piece.isascii() and piece for piece in pieces)
    text = " ".join(words())
    assert len(tokenizer.encode(" " + text)) == len(words())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_seed_draws_the_same_prompts_and_answers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    fake = fake_spec(step_ms=0.0, token_ms=0.0)
    first, second = (FakePrompts(tmp_path, fake, 7) for _ in range(2))
    one = first.draw(8, 4, endpoint="chat", with_answer=True)
    assert one == second.draw(8, 4, endpoint="chat", with_answer=True)
    assert len(one.pieces) == 4
    assert one != first.draw(8, 4, endpoint="chat", with_answer=True)
