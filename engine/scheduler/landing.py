"""What happens when a step has completed: KV counts, commits of complete blocks, tokens, stops, served pieces, pauses.

kernels done -> num_landed -> complete blocks checksummed and committed (now visible) -> tokens -> served pieces
-> requests that were to pause are paused
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.kv.block_manager import BlockState
from engine.messages import NewTokens, Paused, PromptLogprobs
from engine.request import FinishReason
from engine.scheduler.batch import Runner, StepResult, TokenLogprobs
from engine.scheduler.pauses import settle
from engine.scheduler.request_book import RequestBook
from engine.scheduler.request_state import Entry, LaunchedStep, Request, ServedCall
from engine.scheduler.served import ServedCalls, ServeNews


class Landed(msgspec.Struct, kw_only=True):
    """What one landed step caused."""

    step: int
    num_tokens: int
    tokens: list[NewTokens] = []
    replies: list[ServeNews | PromptLogprobs | Paused] = []


def land_step(
    launched: LaunchedStep, result: StepResult, book: RequestBook, served: ServedCalls, runner: Runner
) -> Landed:
    """Apply one result; rows that were given up meanwhile are dropped."""
    assert launched.step == result.step, f"step {result.step} lands, step {launched.step} was expected"
    num_tokens = 0
    live: list[tuple[int, Entry]] = []
    for i, entry in enumerate(launched.entries):
        num_tokens += entry.query_len
        if not entry.seat.closed:
            entry.seat.num_landed += entry.query_len
            live.append((i, entry))
    landed = Landed(step=result.step, num_tokens=num_tokens)
    commit_complete_blocks([entry for _, entry in live], book, runner)
    sampled = result.token_ids.tolist()
    for i, entry in live:
        if isinstance(entry.owner, ServedCall):
            landed.replies += served.offer(entry.owner, runner)
        elif entry.samples:
            entry.seat.num_sampling -= 1
            assert sampled[i] >= 0, f"row {i} of step {result.step} was to be sampled"
            landed.tokens.append(_land_token(entry.owner, sampled[i], result.logprobs.get(i), book))
        if entry.scores is not None:
            landed.replies.append(_land_scores(entry, result.prompt_logprobs[i]))
    book.seats.landed(result.step)
    if book.pausing:
        landed.replies += settle(book)
    return landed


def commit_complete_blocks(entries: list[Entry], book: RequestBook, runner: Runner) -> None:
    """Checksum (one call) and commit every block that these rows have completed."""
    blocks = book.seats.blocks
    complete: list[tuple[int, bytes]] = []
    size = blocks.block_size
    for entry in entries:
        end = entry.seat.num_landed // size
        first = (entry.seat.num_landed - entry.query_len) // size
        if first == end:
            continue
        keys = entry.owner.chain.hash_blocks(entry.owner.tokens()[: entry.seat.num_landed])
        for i in range(first, end):
            if blocks.state(entry.seat.block_ids[i]) is BlockState.LOADING:
                complete.append((entry.seat.block_ids[i], keys[i]))
    if not complete:
        return
    checksums = runner.checksum_blocks(np.array([block_id for block_id, _ in complete], dtype=np.int32))
    for (block_id, key), checksum in zip(complete, checksums, strict=True):
        blocks.commit(block_id, key, checksum)


def _land_scores(entry: Entry, logprobs: tuple[TokenLogprobs, ...]) -> PromptLogprobs:
    """Logprobs of some prompt tokens, told once each, in order."""
    request, scores = entry.owner, entry.scores
    assert isinstance(request, Request) and scores is not None and len(logprobs) == len(scores), "as scheduled"
    assert scores.start == request.num_scored + 1, f"{request.request_id}: prompt logprobs come in order"
    request.num_scored += len(scores)
    return PromptLogprobs(request_id=request.request_id, first_position=scores.start, logprobs=logprobs)


def _land_token(request: Request, token: int, logprobs: TokenLogprobs | None, book: RequestBook) -> NewTokens:
    """Append one sampled token; finish at a stop token or at the counted length."""
    position = len(request.outputs)
    request.outputs.append(token)
    book.counters.generation_tokens += 1
    finish: FinishReason | None = None
    is_stop = token in request.stop_ids and position >= request.params.min_tokens
    if is_stop:
        finish = FinishReason.STOP
    elif len(request.outputs) >= request.max_outputs:
        finish = FinishReason.LENGTH
    if finish is not None:
        book.remove(request)
    return NewTokens(
        request_id=request.request_id,
        first_position=position,
        token_ids=(token,),
        logprobs=() if logprobs is None else (logprobs,),
        finish_reason=finish,
        stop_token=token if is_stop else None,
        num_cached_tokens=max(request.num_cached_tokens, 0),
    )
