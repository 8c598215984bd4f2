"""Choosing and learning: what one placement leads to in the next, and what people are told of it."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import numpy as np
from msgspec.structs import replace

from cluster.router.breakers import OPEN_S
from cluster.router.choosing import MAX_DECISIONS, Chooser
from cluster.router.decision import Decision, words
from cluster.router.effects import Submit
from cluster.router.fleet import Fleet
from cluster.router.kv_index import block_keys
from cluster.router.policies import policy_named
from cluster.router.tracked import Tracked, track
from cluster.types import CacheNews, Heartbeat, SourceFailed, Tokens
from engine.kv.prefix_cache import root_key
from engine.messages import Load
from engine.request import SamplingParams
from tests.cluster.router.views_for_tests import worker

PROMPT = np.arange(3, 3 + 1001, dtype="<i4").tobytes()


class Router:
    """A chooser over d1, d2, p1, p2, all up and alike."""

    def __init__(self, policy: str = "predicted", workers: str = "d1 d2 p1 p2") -> None:
        self.counters: Counter[str] = Counter()
        self.fleet = Fleet()
        self.chooser = Chooser(policy_named(policy), self.fleet, Random(1), self.counters)
        for worker_id in workers.split():
            self.fleet.up(replace(worker(worker_id).info, identity="model", kv_fingerprint="layout"))
        self.num = 0

    def place(self, now: float = 1.0, prompt: bytes = PROMPT, **params: Any) -> Tracked:
        self.num += 1
        submit = Submit(
            request_id=f"r{self.num}",
            prompt=prompt,
            params=SamplingParams(max_tokens=50, **params),
            seeds=(0,),
            deadline=now + 100,
        )
        request = track(submit, now)
        self.chooser.choose(now, request, self.fleet.decoders())
        request.attempt += 1
        return request

    def answer(self, request: Tracked, now: float, *, path: str, cached: int = 0) -> None:
        tokens = Tokens(
            request_id=request.request_id,
            attempt=1,
            choice=0,
            position=0,
            token_ids=(5,),
            num_cached_tokens=cached,
            path=path,  # type: ignore[arg-type]
        )
        self.fleet.prefilled(now, request.request_id, request.prefiller_id)
        self.chooser.first_token(now, request, tokens)

    def hold(self, worker_id: str, num_blocks: int) -> None:
        keys = list(block_keys(root_key("model"), PROMPT, 16))[:num_blocks]
        news = CacheNews(stored=b"".join(key.to_bytes(8, "little") for key in keys))
        self.chooser.on_cache_news(worker_id, news)

    def busy(self, *worker_ids: str, rows: int = 6) -> None:
        for worker_id in worker_ids:
            known = self.fleet.workers[worker_id]
            known.hear(0.5, Heartbeat(info=known.info, load=Load(num_running=rows)))


def decision(request: Tracked) -> Decision:
    assert request.decision is not None
    return request.decision


def test_work_in_flight_counts_at_once() -> None:
    router = Router("least-loaded")
    first, second = router.place(), router.place()
    assert {decision(first).placement.decode, decision(second).placement.decode} == {"d1", "d2"}
    assert {decision(first).sources[0], decision(second).sources[0]} == {"p1", "p2"}
    third = router.place()
    assert decision(third).predicted.queue_ms > 0.0


def test_the_index_leads_to_the_worker_that_holds_the_prompt() -> None:
    router = Router()
    router.busy("d1", "d2")
    router.hold("p2", 60)
    request = router.place()
    assert decision(request).sources[0] == "p2" and dict(decision(request).cached)["p2"] == 960
    again = router.place()
    assert again.hint is not None and again.hint.tokens(decision(request).placement.decode) > 0, "guessed ahead"


def test_the_first_reply_corrects_the_index() -> None:
    router = Router()
    router.busy("d1", "d2")
    router.hold("p2", 60)
    request = router.place()
    router.answer(request, 1.1, path="prefill-decode", cached=0)
    assert router.counters["hints_corrected"] >= 1
    hint = router.place().hint
    assert hint is not None and hint.tokens("p2") == 0


def test_a_source_that_failed_is_avoided_and_tried_again() -> None:
    router = Router("least-loaded", "d1 p1 p2")
    failed = SourceFailed(
        request_id="gone", attempt=1, source_id="p1", source_incarnation="p1-incarnation", reason="silent"
    )
    router.chooser.on_source_failed(1.0, "d1", failed)
    assert router.counters["sources_silent"] == 1
    for _ in range(4):
        assert decision(router.place(1.5)).sources == ("p2",)
    later = [decision(router.place(1.0 + OPEN_S + 0.1 * i)).sources for i in range(8)]
    assert sum("p1" in sources[:1] for sources in later) == 1, "one trial, while nothing is heard of it"
    trial = next(i for i, sources in enumerate(later) if sources[0] == "p1")
    router.answer(request_at(router, 5 + trial), 4.0, path="prefill-decode")
    assert router.chooser.breakers.state(4.0, "d1-incarnation", "p1-incarnation") == "closed"


def request_at(router: Router, number: int) -> Tracked:
    """The request of a placement that was made before."""
    known = router.chooser.decisions(f"r{number}")[0]
    submit = Submit(
        request_id=known.request_id, prompt=PROMPT, params=SamplingParams(max_tokens=50), seeds=(0,), deadline=99.0
    )
    request = track(submit, known.at)
    request.decision = known
    return request


def test_when_every_source_failed_the_decode_worker_does_it_and_it_is_counted() -> None:
    router = Router("least-loaded", "d1 p1")
    failed = SourceFailed(
        request_id="r", attempt=1, source_id="p1", source_incarnation="p1-incarnation", reason="broken"
    )
    router.chooser.on_source_failed(1.0, "d1", failed)
    request = router.place(1.1)
    assert decision(request).sources == () and router.counters["sources_avoided"] == 1
    assert "every source failed" in " ".join(words(decision(request)))


def test_prompt_logprobs_are_no_choice() -> None:
    router = Router()
    request = router.place(prompt_logprobs=1)
    assert decision(request).sources == () and not router.counters
    assert "prompt logprobs are computed where they are told" in " ".join(words(decision(request)))


def test_alone_by_choice_and_by_need_are_counted_apart() -> None:
    router = Router()
    chosen = router.place(prompt=PROMPT[:80])
    assert decision(chosen).placement.alone and router.counters["decode_only_chosen"] == 1
    router.busy("d1", "d2")
    asked = router.place(1.1)
    assert decision(asked).sources
    router.answer(asked, 1.3, path="decode-only")
    router.answer(chosen, 1.3, path="decode-only")
    assert (router.counters["decode_only_chosen"], router.counters["decode_only_fallback"]) == (1, 1)


def test_what_predictions_are_short_of_is_learnt() -> None:
    router = Router()
    router.busy("d1", "d2")
    for i in range(8):
        request = router.place(10.0 * i, np.arange(100 * i, 100 * i + 1001, dtype="<i4").tobytes())
        expected = decision(request).predicted.ttft_ms - decision(request).predicted.overhead_ms
        router.answer(request, 10.0 * i + (expected + 7.0) / 1000, path="prefill-decode")
    assert abs(decision(router.place(100.0, PROMPT[40:])).predicted.overhead_ms - 7.0) < 0.01
    errors = router.chooser.accuracy.errors()
    assert errors.num_ttft == 8 and errors.ttft_p50 < 0.1


def test_a_choice_is_told_in_words_with_its_numbers() -> None:
    router = Router()
    router.busy("d1", "d2")
    router.hold("p2", 60)
    request = router.place()
    told = "\n".join(words(decision(request)))
    assert told.startswith("1001 prompt tokens, about 50 to come: decode on d")
    assert "prefill on p2." in told and "by the KV index: p2 960" in told
    assert "Why (predicted): the least predicted cost" in told and "Predicted: first token after" in told
    assert "Instead" in told and told.endswith("No token yet.")
    router.answer(request, 1.05, path="prefill-decode", cached=960)
    told = "\n".join(words(decision(request)))
    assert told.endswith("Real: first token after 50.0 ms; 960 tokens were cached; path prefill-decode.")


def test_a_plain_policy_tells_its_own_reason_and_is_predicted_all_the_same() -> None:
    request = Router("round-robin").place()
    told = "\n".join(words(decision(request)))
    assert "Why (round-robin): its turn: placement 0 of this router." in told
    assert decision(request).predicted.ttft_ms > 100.0


def test_the_memory_of_decisions_is_bounded() -> None:
    router = Router("round-robin")
    for _ in range(MAX_DECISIONS + 20):
        request = router.place()
        router.fleet.unassign(1.0, request.request_id, decision(request).placement.decode, request.prefiller_id)
    kept = router.chooser.decisions()
    assert len(kept) == MAX_DECISIONS and kept[0].request_id == f"r{MAX_DECISIONS + 20}"
    assert router.chooser.decisions("r1") == () and len(router.chooser.decisions("r200")) == 1
