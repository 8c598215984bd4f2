"""Predicted milliseconds of a placement: pure arithmetic over what workers measured of themselves and what they carry.

    time to first token with a source P, at decode worker D          and by D alone
      wait      for memory of D; for a row as far as that takes        the same, all of it
                longer than queue, compute and transfer
      queue     prefill work that P has                                prefill work that D has
      compute   the prompt after what P has cached                     after what D has cached, D's rows riding along
      transfer  what of it doesn't overlap with computing              -
      steps     D's running step, and the one that runs the last token what is left of D's running step
      overhead  what all this leaves out, learnt from first tokens     the same, learnt apart

    time per token: one decode step of D with this request in it
    cost: the request's own time to its end, and what its work adds to the others on D

No GPU name is looked at. A worker that measured nothing is taken for NOMINAL.
"""

from __future__ import annotations

import msgspec

from cluster.router.views import RequestView, WorkerView
from cluster.types import PeerRate
from engine.scheduler.profile import Profile

NOMINAL = Profile(prefill=((1, 5.0), (1000, 200.0)), decode=((1, 5.0), (32, 20.0)), kv_token_bytes=32768)
NOMINAL_RATE = PeerRate(peer_id="", transport="grpc", gb_per_s=1.0, latency_ms=1.0)
ALONE, REMOTE = "alone", "remote"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds; see the picture above. `source` None: the decode worker alone."""

    decode: str
    source: str | None
    wait_ms: float
    queue_ms: float
    compute_ms: float
    transfer_ms: float
    steps_ms: float
    overhead_ms: float
    tpot_ms: float
    cost_ms: float

    @property
    def ttft_ms(self) -> float:
        """Time to first token, from the dispatch."""
        ahead_ms = self.wait_ms + self.queue_ms
        return ahead_ms + self.compute_ms + self.transfer_ms + self.steps_ms + self.overhead_ms


class DecodeCosts:
    """What decode worker D adds, whatever the source. Milliseconds."""

    def __init__(self, request: RequestView, view: WorkerView) -> None:
        profile, scale = _profile(view), view.scales[1]
        rows, new = view.num_sequences, request.num_choices
        most = view.info.max_num_seqs or rows + new
        running, with_us = min(rows, most), min(rows + new, most)
        context = view.context_tokens
        mine = new * (request.num_tokens + request.num_outputs / 2)
        self.running = running
        self.step_ms = scale * profile.decode_step_ms(running, context)
        self.tpot_ms = scale * profile.decode_step_ms(with_us, context + mine)
        # what rows add to a step that runs anyway; a table's first point is all but its fixed part
        self.riding_ms = max(0.0, self.step_ms - scale * profile.decode[0][1]) if running else 0.0
        answer_ms = request.num_outputs * self.tpot_ms
        self.row_wait_ms = self.memory_wait_ms = 0.0
        if rows + new > most:  # rows come free one by one: each after a whole answer, `most` of them at a time
            self.row_wait_ms = (rows + new - most) * answer_ms / most
        if running and view.num_free_blocks is not None:
            # a full pool: answers end one by one, each giving back about what this request wants
            wanted = request.num_tokens - view.cached_tokens + new * request.num_outputs
            if wanted > view.num_free_blocks * (view.info.block_size or 1):
                self.memory_wait_ms = answer_ms / running
        self.wait_ms = max(self.row_wait_ms, self.memory_wait_ms)
        # in a full batch it takes the row of one that ends, and the others go no faster for that one's end
        others = max(0, with_us - new)
        without_ms = self.step_ms if others == running else scale * profile.decode_step_ms(others, context)
        self.slows_ms = others * request.num_outputs * max(0.0, self.tpot_ms - without_ms)
        self.least_ms = self.wait_ms + answer_ms + self.slows_ms  # of any placement here, before the first token


class SourceCosts:
    """What source P adds, whoever decodes. Milliseconds and tokens. The decode worker runs the last token itself."""

    def __init__(self, request: RequestView, view: WorkerView) -> None:
        profile, wanted = _profile(view), request.num_tokens - 1
        cached = min(view.cached_tokens, wanted)
        computed = wanted - cached
        self.worker_id = view.info.worker_id
        self.cached_tokens = cached
        self.queue_ms = view.backlog_ms
        self.compute_ms = view.scales[0] * profile.prefill_ms(computed, cached)
        self.ready_ms = self.queue_ms + self.compute_ms
        self._wanted = wanted
        # KV of all steps but the last is moved while the next one is computed
        at_once = profile.max_step_tokens
        self._last = wanted if computed <= at_once else computed % at_once or at_once
        self._rates = view.rates
        self._typical = _typical(view.rates)
        self._token_bytes = profile.kv_token_bytes

    def transfer_ms(self, decode: WorkerView) -> float:
        """What of the KV is still to be moved when the source has computed: its last step's, or more on a slow link."""
        rate = self._rates.get(decode.info.worker_id) or self._typical
        moved = self._wanted - decode.cached_tokens
        if moved <= 0:
            return rate.latency_ms
        ms_per_token = self._token_bytes / (rate.gb_per_s * 1e6)
        if self._last >= moved:
            return rate.latency_ms + moved * ms_per_token
        return rate.latency_ms + max(self._last * ms_per_token, moved * ms_per_token - self.compute_ms)


class Predictor:
    """Predicts placements of one request."""

    def __init__(self, request: RequestView) -> None:
        self._request = request

    def remote(self, decode: WorkerView, costs: DecodeCosts, source: SourceCosts) -> Prediction:
        """With this source. A prompt that is computed elsewhere has no row, and waits for one meanwhile."""
        transfer_ms = source.transfer_ms(decode)
        return self._prediction(
            decode,
            costs,
            source=source.worker_id,
            wait_ms=max(costs.memory_wait_ms, costs.row_wait_ms - source.ready_ms - transfer_ms),
            queue_ms=source.queue_ms,
            compute_ms=source.compute_ms,
            transfer_ms=transfer_ms,
            steps_ms=costs.step_ms + costs.tpot_ms,
            overhead_ms=self._request.overheads.get(REMOTE, 0.0),
            stalls_ms=0.0,
        )

    def alone(self, decode: WorkerView, costs: DecodeCosts) -> Prediction:
        """By the decode worker itself: its running rows ride along in every step, and are held up."""
        profile = _profile(decode)
        cached = min(decode.cached_tokens, self._request.num_tokens - 1)
        num_tokens = self._request.num_tokens - cached
        compute_ms = decode.scales[0] * profile.prefill_ms(num_tokens, cached)
        num_steps = max(1.0, compute_ms / max(1.0, profile.max_step_ms))
        return self._prediction(
            decode,
            costs,
            source=None,
            wait_ms=costs.wait_ms,
            queue_ms=decode.backlog_ms,
            compute_ms=compute_ms + num_steps * costs.riding_ms,
            transfer_ms=0.0,
            steps_ms=costs.step_ms / 2,
            overhead_ms=self._request.overheads.get(ALONE, 0.0),
            stalls_ms=costs.running * compute_ms,
        )

    def _prediction(
        self,
        decode: WorkerView,
        costs: DecodeCosts,
        *,
        source: str | None,
        wait_ms: float,
        queue_ms: float,
        compute_ms: float,
        transfer_ms: float,
        steps_ms: float,
        overhead_ms: float,
        stalls_ms: float,
    ) -> Prediction:
        first_ms = wait_ms + queue_ms + compute_ms + transfer_ms + steps_ms + overhead_ms
        own_ms = first_ms + costs.tpot_ms * max(0.0, self._request.num_outputs - 1)
        return Prediction(
            decode=decode.info.worker_id,
            source=source,
            wait_ms=wait_ms,
            queue_ms=queue_ms,
            compute_ms=compute_ms,
            transfer_ms=transfer_ms,
            steps_ms=steps_ms,
            overhead_ms=overhead_ms,
            tpot_ms=costs.tpot_ms,
            cost_ms=own_ms + costs.slows_ms + stalls_ms,
        )


def prefill_work_ms(view: WorkerView, num_tokens: int) -> float:
    """How long a worker is busy with a prompt, less what it has cached: what its backlog grows by."""
    cached = min(view.cached_tokens, num_tokens)
    return view.scales[0] * _profile(view).prefill_ms(num_tokens - cached, cached)


def ms_per_prefill_token(profile: Profile, scale: float) -> float:
    """The plain rate, for tokens of whose prompts nothing is known."""
    if not profile.known:
        profile = NOMINAL
    num_tokens, ms = profile.full_chunk
    return scale * ms / num_tokens


def _profile(view: WorkerView) -> Profile:
    return view.info.profile if view.info.profile.known else NOMINAL


def _typical(rates: dict[str, PeerRate]) -> PeerRate:
    """For a peer that was never served: the one that was served last stands for all."""
    return next(reversed(rates.values()), NOMINAL_RATE) if rates else NOMINAL_RATE
