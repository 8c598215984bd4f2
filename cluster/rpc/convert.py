"""The one home of the conversions between cluster/types.py and protobuf: the link, and the shapes all services share.

`*_to_pb` never fails on what this program made. `*_from_pb` validates what a peer sent and raises WireError, never
anything else. KVSource's messages have their conversions in rpc/convert_fetch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from cluster.rpc.convert_profile import peer_from_pb, peer_to_pb, profile_from_pb, profile_to_pb
from cluster.rpc.pb import messages_pb2 as m
from cluster.rpc.pb import worker_pb2 as w
from cluster.rpc.wire_error import WireError as WireError
from cluster.types import (
    CACHE_KEY_BYTES,
    AbortRequest,
    CacheNews,
    Choice,
    Dispatch,
    Entry,
    Failed,
    Heartbeat,
    Moved,
    News,
    Path,
    PromptScores,
    Release,
    RouterMessage,
    SourceFailed,
    SourceFailure,
    SourceRef,
    Stage,
    Tokens,
    WorkerInfo,
    WorkerState,
)
from engine.config import Role
from engine.messages import Load
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs

_ROLES: dict[Role, m.Role] = {"prefill": m.ROLE_PREFILL, "decode": m.ROLE_DECODE}
_STATES: dict[WorkerState, m.WorkerState] = {
    "starting": m.WORKER_STATE_STARTING,
    "ready": m.WORKER_STATE_READY,
    "draining": m.WORKER_STATE_DRAINING,
    "switching": m.WORKER_STATE_SWITCHING,
    "verifying": m.WORKER_STATE_VERIFYING,
    "failed": m.WORKER_STATE_FAILED,
}
_ROLE_OF = {number: name for name, number in _ROLES.items()}
_STATE_OF = {number: name for name, number in _STATES.items()}
_PATHS: dict[str, Path] = {name: name for name in get_args(Path)}
_STAGES: dict[str, Stage] = {name: name for name in get_args(Stage)}
_FAILURES: dict[str, SourceFailure] = {name: name for name in get_args(SourceFailure)}
_FINISH: dict[str, FinishReason] = {reason.value: reason for reason in FinishReason}
_INFO_PLAIN = (
    *("worker_id", "incarnation", "epoch", "address", "model", "identity", "kv_fingerprint", "numerics_class"),
    *("block_size", "max_model_len", "max_num_seqs", "vocab_size", "pool", "node", "pid"),
)
_SAMPLING_PLAIN = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "max_tokens", "ignore_eos"),
)


def check_tokens(tokens: bytes, name: str) -> bytes:
    """`tokens` itself. Raises WireError unless it is whole int32s."""
    if len(tokens) % 4:
        raise WireError(f"{name} is not a whole number of int32 tokens")
    return tokens


# ---- WorkerInfo, Load, SourceRef


def info_to_pb(info: WorkerInfo) -> m.WorkerInfo:
    return m.WorkerInfo(
        role=_ROLES[info.role],
        state=_STATES[info.state],
        eos_token_ids=info.eos_token_ids,
        profile=profile_to_pb(info.profile),
        **{name: getattr(info, name) for name in _INFO_PLAIN},
    )


def info_from_pb(pb: m.WorkerInfo) -> WorkerInfo:
    if pb.role not in _ROLE_OF or pb.state not in _STATE_OF:
        raise WireError(f"worker info with role {pb.role} and state {pb.state}")
    return WorkerInfo(
        role=_ROLE_OF[pb.role],
        state=_STATE_OF[pb.state],
        eos_token_ids=tuple(pb.eos_token_ids),
        profile=profile_from_pb(pb.profile),
        **{name: getattr(pb, name) for name in _INFO_PLAIN},
    )


def load_to_pb(load: Load) -> m.Load:
    return m.Load(**{name: getattr(load, name) for name in Load.__struct_fields__})


def load_from_pb(pb: m.Load) -> Load:
    return Load(**{name: getattr(pb, name) for name in Load.__struct_fields__})


def source_to_pb(source: SourceRef) -> m.Source:
    return m.Source(
        worker_id=source.worker_id,
        incarnation=source.incarnation,
        address=source.address,
        max_compute_tokens=source.max_compute_tokens,
    )


def source_from_pb(pb: m.Source) -> SourceRef:
    return SourceRef(
        worker_id=pb.worker_id,
        incarnation=pb.incarnation,
        address=pb.address,
        max_compute_tokens=pb.max_compute_tokens,
    )


# ---- router -> worker


def params_to_pb(params: SamplingParams) -> m.Sampling:
    """Texts, n and seed stay with the router: it matches text, and each choice has its own seed."""
    assert params.max_tokens is not None, "the router sets max_tokens"
    return m.Sampling(
        logit_bias=params.logit_bias,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        allowed_token_ids=_ids_to_bytes(params.allowed_token_ids),
        bad_token_sequences=[_ids_to_bytes(ids) for ids in params.bad_token_sequences],
        **{name: getattr(params, name) for name in _SAMPLING_PLAIN},
    )


def _ids_to_bytes(ids: tuple[int, ...]) -> bytes:
    return np.array(ids, dtype="<i4").tobytes() if ids else b""


def _ids_from_bytes(data: bytes, name: str) -> tuple[int, ...]:
    return tuple(np.frombuffer(check_tokens(data, name), dtype="<i4").tolist()) if data else ()


def params_from_pb(pb: m.Sampling) -> SamplingParams:
    try:
        return SamplingParams(
            logit_bias=dict(pb.logit_bias),
            stop_token_ids=tuple(pb.stop_token_ids),
            logprobs=pb.logprobs if pb.HasField("logprobs") else None,
            prompt_logprobs=pb.prompt_logprobs if pb.HasField("prompt_logprobs") else None,
            allowed_token_ids=_ids_from_bytes(pb.allowed_token_ids, "allowed_token_ids"),
            bad_token_sequences=tuple(_ids_from_bytes(ids, "bad_token_sequences") for ids in pb.bad_token_sequences),
            **{name: getattr(pb, name) for name in _SAMPLING_PLAIN},
        )
    except ValueError as error:
        raise WireError(str(error)) from error


def dispatch_to_pb(dispatch: Dispatch) -> w.Dispatch:
    return w.Dispatch(
        request_id=dispatch.request_id,
        attempt=dispatch.attempt,
        incarnation=dispatch.incarnation,
        epoch=dispatch.epoch,
        prompt=dispatch.prompt,
        choices=[w.Choice(index=c.index, seed=c.seed, outputs=c.outputs) for c in dispatch.choices],
        sampling=params_to_pb(dispatch.params),
        cache_salt=dispatch.cache_salt,
        priority=dispatch.priority,
        moved=dispatch.moved,
        remaining_ms=dispatch.remaining_ms,
        sources=[source_to_pb(source) for source in dispatch.sources],
    )


def dispatch_from_pb(pb: w.Dispatch) -> Dispatch:
    if pb.adapters or pb.media_hashes:
        raise WireError("adapters and media are not supported by this worker")
    if not pb.request_id or not pb.prompt or not pb.choices:
        raise WireError("a dispatch needs a request id, a prompt and a choice")
    return Dispatch(
        request_id=pb.request_id,
        attempt=pb.attempt,
        incarnation=pb.incarnation,
        epoch=pb.epoch,
        prompt=check_tokens(pb.prompt, "prompt"),
        choices=tuple(
            Choice(index=c.index, seed=c.seed, outputs=check_tokens(c.outputs, "outputs")) for c in pb.choices
        ),
        params=params_from_pb(pb.sampling),
        remaining_ms=pb.remaining_ms,
        sources=tuple(source_from_pb(source) for source in pb.sources),
        cache_salt=pb.cache_salt,
        priority=pb.priority,
        moved=pb.moved,
    )


def router_message_to_pb(message: RouterMessage) -> w.RouterMessage:
    if isinstance(message, Dispatch):
        return w.RouterMessage(dispatch=dispatch_to_pb(message))
    if isinstance(message, AbortRequest):
        return w.RouterMessage(abort=w.Abort(request_id=message.request_id, attempt=message.attempt))
    return w.RouterMessage(release=w.Release(request_id=message.request_id, attempt=message.attempt))


def router_batch_to_pb(messages: Sequence[RouterMessage], taken: int = 0) -> w.RouterMessage:
    """One message for one or several, and for the number of batches taken."""
    parts = [router_message_to_pb(message) for message in messages]
    if taken:
        parts.append(w.RouterMessage(taken=taken))
    return parts[0] if len(parts) == 1 else w.RouterMessage(batch=w.RouterBatch(messages=parts))


def router_messages_in(pb: w.RouterMessage) -> Sequence[w.RouterMessage]:
    """The messages of a batch, or the one message. A batch within a batch is refused by router_message_from_pb."""
    return pb.batch.messages if pb.WhichOneof("kind") == "batch" else (pb,)


def router_message_from_pb(pb: w.RouterMessage) -> RouterMessage:
    kind = pb.WhichOneof("kind")
    if kind == "dispatch":
        return dispatch_from_pb(pb.dispatch)
    if kind == "abort":
        return AbortRequest(request_id=pb.abort.request_id, attempt=pb.abort.attempt)
    if kind == "release":
        return Release(request_id=pb.release.request_id, attempt=pb.release.attempt)
    raise WireError(f"a link message of kind {kind} after Hello")


# ---- worker -> router


def _logprobs_to_pb(logprobs: TokenLogprobs) -> m.TokenLogprobs:
    return m.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[
            m.TopLogprob(token_id=token, logprob=value)
            for token, value in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        ],
    )


def _logprobs_from_pb(pb: m.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=pb.logprob,
        top_ids=tuple(top.token_id for top in pb.top),
        top_logprobs=tuple(top.logprob for top in pb.top),
    )


def _fill_tokens(pb: w.Tokens, entry: Tokens) -> None:
    """In place, and only what is not the default: once per token, a copy and ten assignments would be felt."""
    pb.choice = entry.choice
    pb.position = entry.position
    pb.token_ids.extend(entry.token_ids)
    if entry.logprobs:
        pb.logprobs.extend(_logprobs_to_pb(logprobs) for logprobs in entry.logprobs)
    if entry.finish_reason is not None:
        pb.finish_reason = entry.finish_reason.value
    if entry.stop_token is not None:
        pb.stop_token = entry.stop_token
    if entry.num_cached_tokens:
        pb.num_cached_tokens = entry.num_cached_tokens
    if entry.path is not None:
        pb.path = entry.path


def entry_to_pb(entry: Entry) -> w.Entry:
    pb = w.Entry(request_id=entry.request_id, attempt=entry.attempt)
    if isinstance(entry, Tokens):
        _fill_tokens(pb.tokens, entry)
    elif isinstance(entry, News):
        news = w.News(stage=entry.stage, computed_tokens=entry.computed_tokens, queue_ms=entry.queue_ms)
        pb.news.CopyFrom(news)
    elif isinstance(entry, PromptScores):
        pb.prompt_scores.first_position = entry.first_position
        pb.prompt_scores.logprobs.extend(_logprobs_to_pb(logprobs) for logprobs in entry.logprobs)
    elif isinstance(entry, SourceFailed):
        pb.source_failed.source_id = entry.source_id
        pb.source_failed.source_incarnation = entry.source_incarnation
        pb.source_failed.reason = entry.reason
    elif isinstance(entry, Moved):
        pb.moved.CopyFrom(w.Moved(held_tokens=entry.held_tokens))
    elif isinstance(entry, CacheNews):
        pb.cache.CopyFrom(w.CacheNews(reset=entry.reset, stored=entry.stored, evicted=entry.evicted))
    else:
        pb.failed.CopyFrom(w.Failed(code=entry.code, message=entry.message))
    return pb


def entry_from_pb(pb: w.Entry) -> Entry:
    kind = pb.WhichOneof("kind")
    if kind == "tokens":
        return _tokens_from_pb(pb.request_id, pb.attempt, pb.tokens)
    if kind == "news":
        if pb.news.stage not in _STAGES:
            raise WireError(f"news of stage {pb.news.stage!r}")
        return News(
            request_id=pb.request_id,
            attempt=pb.attempt,
            stage=_STAGES[pb.news.stage],
            computed_tokens=pb.news.computed_tokens,
            queue_ms=pb.news.queue_ms,
        )
    if kind == "failed":
        return Failed(request_id=pb.request_id, attempt=pb.attempt, code=pb.failed.code, message=pb.failed.message)
    if kind == "prompt_scores":
        return PromptScores(
            request_id=pb.request_id,
            attempt=pb.attempt,
            first_position=pb.prompt_scores.first_position,
            logprobs=tuple(_logprobs_from_pb(logprobs) for logprobs in pb.prompt_scores.logprobs),
        )
    if kind == "source_failed":
        return _source_failed_from_pb(pb)
    if kind == "moved":
        return Moved(request_id=pb.request_id, attempt=pb.attempt, held_tokens=pb.moved.held_tokens)
    if kind == "cache":
        if len(pb.cache.stored) % CACHE_KEY_BYTES or len(pb.cache.evicted) % CACHE_KEY_BYTES:
            raise WireError("cache news with half a key")
        return CacheNews(reset=pb.cache.reset, stored=pb.cache.stored, evicted=pb.cache.evicted)
    raise WireError("an entry of no kind")


def _source_failed_from_pb(pb: w.Entry) -> SourceFailed:
    if pb.source_failed.reason not in _FAILURES:
        raise WireError(f"a source that failed for {pb.source_failed.reason!r}")
    return SourceFailed(
        request_id=pb.request_id,
        attempt=pb.attempt,
        source_id=pb.source_failed.source_id,
        source_incarnation=pb.source_failed.source_incarnation,
        reason=_FAILURES[pb.source_failed.reason],
    )


def _tokens_from_pb(request_id: str, attempt: int, pb: w.Tokens) -> Tokens:
    finish_reason, path, logprobs = pb.finish_reason, pb.path, pb.logprobs
    if finish_reason and finish_reason not in _FINISH:
        raise WireError(f"finish reason {finish_reason!r}")
    if path and path not in _PATHS:
        raise WireError(f"path {path!r}")
    return Tokens(
        request_id=request_id,
        attempt=attempt,
        choice=pb.choice,
        position=pb.position,
        token_ids=tuple(pb.token_ids),
        logprobs=tuple(map(_logprobs_from_pb, logprobs)) if logprobs else (),
        finish_reason=_FINISH.get(finish_reason),
        stop_token=pb.stop_token if pb.HasField("stop_token") else None,
        num_cached_tokens=pb.num_cached_tokens,
        path=_PATHS.get(path),
    )


def batch_to_pb(entries: tuple[Entry, ...]) -> w.WorkerMessage:
    return w.WorkerMessage(batch=w.Batch(entries=[entry_to_pb(entry) for entry in entries]))


def heartbeat_to_pb(heartbeat: Heartbeat) -> w.WorkerMessage:
    return w.WorkerMessage(
        heartbeat=w.Heartbeat(
            info=info_to_pb(heartbeat.info),
            load=load_to_pb(heartbeat.load),
            step_count=heartbeat.step_count,
            step_age_ms=heartbeat.step_age_ms,
            peers=[peer_to_pb(peer) for peer in heartbeat.peers],
        )
    )


def worker_message_from_pb(pb: w.WorkerMessage) -> WorkerInfo | Heartbeat | tuple[Entry, ...]:
    """A Welcome's info, a heartbeat, or a batch's entries."""
    kind = pb.WhichOneof("kind")
    if kind == "batch":
        return tuple(entry_from_pb(entry) for entry in pb.batch.entries)
    if kind == "heartbeat":
        return Heartbeat(
            info=info_from_pb(pb.heartbeat.info),
            load=load_from_pb(pb.heartbeat.load),
            step_count=pb.heartbeat.step_count,
            step_age_ms=pb.heartbeat.step_age_ms,
            peers=tuple(peer_from_pb(peer) for peer in pb.heartbeat.peers),
        )
    if kind == "welcome":
        return info_from_pb(pb.welcome)
    raise WireError("a worker message of no kind")
