"""Where one request goes: the views of this moment, the policy, and what is learnt from how it turned out.

    choose        KV index -> views -> policy -> breakers' veto -> Decision (kept for `neap status --why`)
    first_token   overhead learnt, KV index corrected, breaker closed
    ended         time per token, length of answers

No I/O. One pass over the workers for each dispatch, and one over the prompt's blocks as far as anybody holds them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from random import Random

from cluster.router.accuracy import Accuracy
from cluster.router.backlog import Work
from cluster.router.breakers import Breakers
from cluster.router.decision import Decision
from cluster.router.fleet import Fleet, Worker
from cluster.router.kv_index import KVIndex, PrefixHint
from cluster.router.policies import Placement, Policy
from cluster.router.predict import DecodeCosts, Prediction, Predictor, SourceCosts, prefill_work_ms
from cluster.router.tracked import Tracked
from cluster.router.views import RequestView, WorkerView
from cluster.types import CacheNews, SourceFailed, Tokens

MAX_SOURCES = 3
MAX_DECISIONS = 256


class Chooser:
    """The choices of one router. `counters` are the dispatcher's; `may_be_alone`: see RequestView."""

    def __init__(
        self, policy: Policy, fleet: Fleet, rng: Random, counters: Counter[str], *, may_be_alone: bool = True
    ) -> None:
        self.index = KVIndex()
        self.breakers = Breakers()
        self.accuracy = Accuracy()
        self._policy = policy
        self._fleet = fleet
        self._rng = rng
        self._counters = counters
        self._may_be_alone = may_be_alone
        self._num_placed = 0
        self._decisions: OrderedDict[tuple[str, int], Decision] = OrderedDict()

    # ---- choosing

    def choose(self, now: float, request: Tracked, decoders: list[Worker]) -> Decision:
        """Decide for the request's next attempt, and count it. `decoders` have room and are not empty."""
        is_scored = request.is_scored
        sources = [] if is_scored else self._fleet.sources(decoders[0].info)
        hint = self._hint(request, decoders[0]) if self._policy.wants_cache and not is_scored else None
        held, avoided = hint.tokens if hint is not None else _none_held, self.breakers.avoided
        decode = [
            worker.view(now, cached_tokens=held(worker.info.worker_id), avoid=avoided(now, worker.info.incarnation))
            for worker in decoders
        ]
        prefill = [worker.view(now, cached_tokens=held(worker.info.worker_id)) for worker in sources]
        view = RequestView(
            num_tokens=request.num_tokens + request.num_outputs // max(1, len(request.choices)),
            num_choices=request.num_unfinished,
            turn=self._num_placed,
            num_outputs=min(float(request.submit.params.max_tokens or 1 << 30), self.accuracy.mean_outputs),
            overheads=self.accuracy.overheads,
            may_be_alone=self._may_be_alone,
        )
        self._num_placed += 1
        placement = self._policy.place(view, decode, prefill, self._rng)
        decision = self._decide(now, request, view, placement, decode, prefill)
        if hint is not None:
            for worker_id in (placement.decode, *decision.sources[:1]):
                self.index.guess(hint, worker_id)
        request.hint, request.decision = hint, decision
        return decision

    def _hint(self, request: Tracked, decoder: Worker) -> PrefixHint:
        info, submit = decoder.info, request.submit
        return self.index.match(
            submit.prompt, identity=info.identity, cache_salt=submit.cache_salt, block_size=info.block_size
        )

    def _decide(
        self,
        now: float,
        request: Tracked,
        view: RequestView,
        placement: Placement,
        decode: list[WorkerView],
        prefill: list[WorkerView],
    ) -> Decision:
        chosen = next(one for one in decode if one.info.worker_id == placement.decode)
        allowed = tuple(source for source in placement.sources if source not in chosen.avoid)[:MAX_SOURCES]
        first = next((one for one in prefill if allowed and one.info.worker_id == allowed[0]), None)
        if placement.alone:
            self._counters["decode_only_chosen"] += 1
        elif first is None and not request.is_scored:
            self._counters["sources_avoided" if prefill else "no_prefill_worker"] += 1
        involved = [chosen] if first is None else [chosen, first]
        decision = Decision(
            request_id=request.request_id,
            attempt=request.attempt + 1,
            at=now,
            policy=self._policy.name,
            num_tokens=view.num_tokens,
            num_outputs=view.num_outputs,
            placement=placement,
            sources=allowed,
            avoided=chosen.avoid,
            is_scored=request.is_scored,
            predicted=self._predicted(view, placement, chosen, first),
            cached=tuple((one.info.worker_id, one.cached_tokens) for one in involved),
        )
        self._remember(decision)
        self._count(now, request, view, chosen, first)
        return decision

    def _predicted(
        self, view: RequestView, placement: Placement, decode: WorkerView, source: WorkerView | None
    ) -> Prediction:
        """The policy's own prediction of what was chosen, or one made now for a policy that doesn't predict."""
        source_id = source.info.worker_id if source is not None else None
        for one in placement.considered[:1]:
            if (one.decode, one.source) == (decode.info.worker_id, source_id):
                return one
        predictor, costs = Predictor(view), DecodeCosts(view, decode)
        if source is None:
            return predictor.alone(decode, costs)
        return predictor.remote(decode, costs, SourceCosts(view, source))

    def _count(
        self, now: float, request: Tracked, view: RequestView, decode: WorkerView, source: WorkerView | None
    ) -> None:
        """Our own work in flight counts at once."""
        prefiller = source or decode
        work = Work(
            num_tokens=view.num_tokens - min(prefiller.cached_tokens, view.num_tokens),
            ms=prefill_work_ms(prefiller, view.num_tokens),
        )
        request.prefiller_id = prefiller.info.worker_id
        self._fleet.assign(
            now,
            request.request_id,
            decode.info.worker_id,
            view.num_choices,
            view.num_tokens,
            request.prefiller_id,
            work,
        )
        if source is not None:
            self.breakers.chosen(now, decode.info.incarnation, source.info.incarnation)

    def _remember(self, decision: Decision) -> None:
        self._decisions[decision.request_id, decision.attempt] = decision
        if len(self._decisions) > MAX_DECISIONS:
            self._decisions.popitem(last=False)

    # ---- learning

    def first_token(self, now: float, request: Tracked, tokens: Tokens) -> None:
        """The first token of an attempt."""
        decision, hint = request.decision, request.hint
        if decision is None:
            return
        decision.ttft_ms = (now - decision.at) * 1000
        decision.path, decision.cached_tokens = tokens.path, tokens.num_cached_tokens
        with_source = (tokens.path or "").startswith("prefill-decode")
        if with_source != bool(decision.sources):
            # what misses at most one block is not worth a call (worker/pull.py): no failure
            missing = decision.num_tokens - 1 - tokens.num_cached_tokens
            if decision.sources and missing > self._fleet.workers[decision.placement.decode].info.block_size:
                self._counters["decode_only_fallback"] += 1
        elif not decision.failed:
            predicted = decision.predicted
            self.accuracy.first_token(
                decision.kind,
                predicted_ms=predicted.ttft_ms,
                overhead_ms=predicted.overhead_ms,
                real_ms=decision.ttft_ms,
            )
        decode, source = decision.placement.decode, decision.source
        if with_source and source is not None:
            self._close(decode, source)
        if hint is not None:
            # the count is the larger of both workers', so a worker that was expected to hold more did not
            for one in (decode, source):
                if one is not None and self.index.correct(hint, one, tokens.num_cached_tokens):
                    self._counters["hints_corrected"] += 1

    def ended(self, now: float, request: Tracked) -> None:
        """Every choice is complete."""
        decision, num_outputs = request.decision, request.num_outputs / max(1, len(request.choices))
        if decision is None:
            return
        if decision.ttft_ms is not None and num_outputs >= 2 and decision.attempt == 1:
            decision.tpot_ms = ((now - decision.at) * 1000 - decision.ttft_ms) / (num_outputs - 1)
        self.accuracy.end(
            num_outputs=round(num_outputs),
            predicted_tpot_ms=decision.predicted.tpot_ms,
            real_tpot_ms=decision.tpot_ms,
        )

    def on_cache_news(self, worker_id: str, news: CacheNews) -> None:
        """A worker's prefix cache changed. A policy that never asks for it needs no index."""
        if self._policy.wants_cache:
            self.index.update(worker_id, news)

    def on_source_failed(self, now: float, worker_id: str, failed: SourceFailed) -> None:
        """A decode worker reports a source. It counts whatever has become of the request."""
        self._counters[f"sources_{failed.reason}"] += 1
        for decision in self.decisions(failed.request_id)[:1]:
            if decision.attempt == failed.attempt:
                decision.failed[failed.source_id] = failed.reason
        worker = self._fleet.workers.get(worker_id)
        if worker is not None:
            self.breakers.fail(
                now,
                worker.info.incarnation,
                failed.source_incarnation,
                source_id=failed.source_id,
                reason=failed.reason,
            )

    def worker_lost(self, worker_id: str) -> None:
        """Its link broke: a new one begins with all that it holds."""
        self.index.forget(worker_id)

    def worker_replaced(self, incarnation: str) -> None:
        """This incarnation will not come back."""
        self.breakers.forget(incarnation)

    def _close(self, decode: str, source: str) -> None:
        workers = self._fleet.workers
        if decode in workers and source in workers:
            self.breakers.succeed(workers[decode].info.incarnation, workers[source].info.incarnation)

    # ---- for people

    def decisions(self, request_id: str | None = None) -> tuple[Decision, ...]:
        """The last ones, newest first; of one request if asked."""
        newest_first = (decision for decision in reversed(self._decisions.values()))
        return tuple(one for one in newest_first if request_id is None or one.request_id == request_id)


def _none_held(worker_id: str) -> int:
    return 0
