"""Types to protobuf bytes and back give the same value; what a peer must not send is a WireError."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster import types
from cluster.rpc import convert as c
from cluster.rpc import convert_fetch as f
from cluster.rpc.pb import kv_source_pb2, messages_pb2, worker_pb2
from engine.config import Role
from engine.messages import Load
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.scheduler.profile import Profile

# many processes may share this machine's two cores
LOADED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

text = st.text(st.characters(codec="utf-8"), max_size=12)
u32 = st.integers(0, 2**32 - 1)
u63 = st.integers(0, 2**63 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
f32 = st.floats(width=32, allow_nan=False)
tokens = st.lists(i32, min_size=1, max_size=8).map(
    lambda ids: b"".join(i.to_bytes(4, "little", signed=True) for i in ids)
)


keys = st.lists(st.binary(min_size=8, max_size=8), max_size=4).map(b"".join)


def tuples(of: st.SearchStrategy[Any], min_size: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=4, min_size=min_size).map(tuple)


ms = st.floats(0, 1e6, allow_subnormal=False)
tables = st.dictionaries(u32, ms, min_size=1, max_size=5).map(lambda points: tuple(sorted(points.items())))
profiles = st.just(Profile()) | st.builds(
    Profile,
    prefill=tables,
    decode=tables,
    prefill_ms_per_token_kilocontext=ms,
    decode_ms_per_row_kilocontext=ms,
    max_step_ms=ms,
    max_step_tokens=u32,
    kv_token_bytes=u32,
)
infos = st.builds(
    types.WorkerInfo,
    **{name: text for name, kind in get_type_hints(types.WorkerInfo).items() if kind is str},
    **{name: u32 for name, kind in get_type_hints(types.WorkerInfo).items() if kind is int},
    role=st.sampled_from(get_args(Role)),
    state=st.sampled_from(get_args(types.WorkerState)),
    eos_token_ids=tuples(i32),
    profile=profiles,
)
sources = st.builds(
    types.SourceRef, worker_id=text, incarnation=text, address=text, max_compute_tokens=st.integers(-1, 2**40)
)
sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 1 << 20),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    stop_token_ids=tuples(i32),
    min_tokens=st.integers(0, 4),
    max_tokens=st.integers(4, 2**20),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    allowed_token_ids=tuples(st.integers(0, 2**31 - 1)),
    bad_token_sequences=tuples(tuples(st.integers(0, 2**31 - 1), min_size=1)),
)
dispatches = st.builds(
    types.Dispatch,
    request_id=text.filter(bool),
    attempt=u32,
    incarnation=text,
    epoch=u63,
    prompt=tokens,
    choices=tuples(st.builds(types.Choice, index=u32, seed=u63, outputs=tokens | st.just(b"")), min_size=1),
    params=sampling,
    remaining_ms=u63,
    sources=tuples(sources),
    cache_salt=st.binary(max_size=8),
    priority=i32,
)
router_messages = (
    dispatches
    | st.builds(types.AbortRequest, request_id=text, attempt=u32)
    | st.builds(types.Release, request_id=text, attempt=u32)
)


@st.composite
def token_logprobs(draw: st.DrawFn) -> TokenLogprobs:
    top = draw(st.lists(st.tuples(i32, f32), max_size=3))
    return TokenLogprobs(logprob=draw(f32), top_ids=tuple(t for t, _ in top), top_logprobs=tuple(v for _, v in top))


entries = (
    st.builds(
        types.Tokens,
        request_id=text,
        attempt=u32,
        choice=u32,
        position=u32,
        token_ids=tuples(i32),
        logprobs=tuples(token_logprobs()),
        finish_reason=st.none() | st.sampled_from(FinishReason),
        stop_token=st.none() | i32,
        num_cached_tokens=u32,
        path=st.none() | st.sampled_from(get_args(types.Path)),
    )
    | st.builds(
        types.News,
        request_id=text,
        attempt=u32,
        stage=st.sampled_from(get_args(types.Stage)),
        computed_tokens=u32,
        queue_ms=u32,
    )
    | st.builds(
        types.PromptScores,
        request_id=text,
        attempt=u32,
        first_position=u32,
        logprobs=tuples(token_logprobs()),
    )
    | st.builds(types.Failed, request_id=text, attempt=u32, code=text, message=text)
    | st.builds(
        types.SourceFailed,
        request_id=text,
        attempt=u32,
        source_id=text,
        source_incarnation=text,
        reason=st.sampled_from(get_args(types.SourceFailure)),
    )
    | st.builds(types.CacheNews, reset=st.booleans(), stored=keys, evicted=keys)
)
peer_rates = st.builds(
    types.PeerRate,
    peer_id=text,
    transport=st.sampled_from(get_args(types.Transport)),
    gb_per_s=st.floats(0.001, 1e3),
    latency_ms=ms,
)
loads = st.builds(Load, **dict.fromkeys(Load.__struct_fields__, u32))
pieces = st.builds(
    types.Piece,
    call_id=text,
    source_incarnation=text,
    index=u32,
    first_block=u32,
    end_tokens=u32,
    num_layers=u32,
    dtype=text,
    shape=tuples(u32),
    checksum_algorithm=text,
    checksums=tuples(st.integers(0, 2**64 - 1)),
    block_ids=tuples(u32),
    payload=st.binary(max_size=64),
    first_layer=u32,
)
replies = (
    st.builds(
        types.FetchAccepted,
        cached_tokens=u32,
        end_tokens=u32,
        queue_ms=u32,
        transport=st.sampled_from(get_args(types.Transport)),
        local=st.none() | st.builds(types.LocalMemory, path=text, nonce=st.binary(max_size=16), num_blocks=u32),
    )
    | st.builds(types.FetchBusy, retry_ms=u32)
    | st.builds(types.FetchMoved, to=sources)
    | st.builds(types.FetchRefused, code=text, message=text)
    | st.builds(types.FetchNews, computed_tokens=u32, queue_ms=u32)
    | pieces
    | st.just(types.FetchOfferedAll())
)


@LOADED
@given(router_messages)
def test_router_messages_survive_the_wire(message: types.RouterMessage) -> None:
    wire = c.router_message_to_pb(message).SerializeToString()
    assert c.router_message_from_pb(worker_pb2.RouterMessage.FromString(wire)) == message


@LOADED
@given(tuples(entries), infos, loads, u63, tuples(peer_rates))
def test_worker_messages_survive_the_wire(
    batch: tuple[types.Entry, ...],
    info: types.WorkerInfo,
    load: Load,
    count: int,
    peers: tuple[types.PeerRate, ...],
) -> None:
    def there_and_back(message: worker_pb2.WorkerMessage) -> object:
        return c.worker_message_from_pb(worker_pb2.WorkerMessage.FromString(message.SerializeToString()))

    heartbeat = types.Heartbeat(info=info, load=load, step_count=count, step_age_ms=count, peers=peers)
    assert there_and_back(c.batch_to_pb(batch)) == batch
    assert there_and_back(c.heartbeat_to_pb(heartbeat)) == heartbeat
    assert there_and_back(worker_pb2.WorkerMessage(welcome=c.info_to_pb(info))) == info


@LOADED
@given(replies)
def test_fetch_replies_survive_the_wire(reply: types.FetchReply) -> None:
    wire = f.fetch_reply_to_pb(reply).SerializeToString()
    assert f.fetch_reply_from_pb(kv_source_pb2.FetchReply.FromString(wire)) == reply


@LOADED
@given(tokens, tuples(st.sampled_from(get_args(types.Transport))), st.integers(-1, 2**40))
def test_fetch_client_messages_survive_the_wire(
    ids: bytes, transports: tuple[types.Transport, ...], max_compute_tokens: int
) -> None:
    opened = _open(ids, transports, max_compute_tokens)
    wire = f.open_to_pb(opened).SerializeToString()
    assert f.open_from_pb(kv_source_pb2.FetchClientMessage.FromString(wire)) == opened
    taken = types.FetchTaken(call_id="call", piece_index=7)
    assert f.taken_from_pb("call", f.taken_to_pb(taken)) == taken


def _open(ids: bytes, transports: tuple[types.Transport, ...] = (), max_compute_tokens: int = 0) -> types.FetchOpen:
    return types.FetchOpen(
        call_id="call",
        request_id="r",
        attempt=1,
        source_incarnation="s",
        receiver_id="d",
        receiver_incarnation="i",
        identity="x",
        kv_fingerprint="y",
        tokens=ids,
        start=0,
        end=len(ids) // 4,
        max_compute_tokens=max_compute_tokens,
        remaining_ms=5,
        cache_salt=b"z",
        transports=transports,
    )


DISPATCH = types.Dispatch(
    request_id="r",
    attempt=1,
    incarnation="i",
    epoch=1,
    prompt=b"abcd",
    choices=(types.Choice(index=0, seed=1),),
    params=SamplingParams(max_tokens=4),
    remaining_ms=1,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_id": ""}, "request id"),
        ({"prompt": b""}, "prompt"),
        ({"prompt": b"abcde"}, "int32"),
        ({"choices": ()}, "choice"),
        ({"choices": (types.Choice(index=0, seed=1, outputs=b"a"),)}, "int32"),
    ],
)
def test_bad_dispatches_are_wire_errors(changes: dict[str, Any], words: str) -> None:
    message = c.router_message_to_pb(replace(DISPATCH, **changes))
    with pytest.raises(c.WireError, match=words):
        c.router_message_from_pb(message)


def test_bad_sampling_and_reserved_fields_are_wire_errors() -> None:
    message = c.router_message_to_pb(DISPATCH)
    message.dispatch.sampling.temperature = float("nan")
    with pytest.raises(c.WireError, match="temperature"):
        c.router_message_from_pb(message)
    for field, value in (("allowed_token_ids", b"abcde"), ("allowed_token_ids", b"\xff" * 4)):
        message = c.router_message_to_pb(DISPATCH)
        setattr(message.dispatch.sampling, field, value)
        with pytest.raises(c.WireError, match=field):
            c.router_message_from_pb(message)
    message = c.router_message_to_pb(DISPATCH)
    message.dispatch.adapters.append("lora")
    with pytest.raises(c.WireError, match="adapters"):
        c.router_message_from_pb(message)


def test_unknown_kinds_and_names_are_wire_errors() -> None:
    with pytest.raises(c.WireError):
        c.router_message_from_pb(worker_pb2.RouterMessage())
    with pytest.raises(c.WireError):
        c.worker_message_from_pb(worker_pb2.WorkerMessage())
    with pytest.raises(c.WireError):
        c.info_from_pb(messages_pb2.WorkerInfo())
    with pytest.raises(c.WireError):
        c.entry_from_pb(worker_pb2.Entry(news=worker_pb2.News(stage="dreaming")))
    with pytest.raises(c.WireError):
        c.entry_from_pb(worker_pb2.Entry(tokens=worker_pb2.Tokens(finish_reason="bored")))
    with pytest.raises(c.WireError, match="half a key"):
        c.entry_from_pb(worker_pb2.Entry(cache=worker_pb2.CacheNews(stored=b"1234567")))
    with pytest.raises(c.WireError, match="bored"):
        c.entry_from_pb(worker_pb2.Entry(source_failed=worker_pb2.SourceFailed(reason="bored")))
    with pytest.raises(c.WireError):
        f.fetch_reply_from_pb(kv_source_pb2.FetchReply())
    with pytest.raises(c.WireError):
        f.open_from_pb(f.taken_to_pb(types.FetchTaken(call_id="c", piece_index=0)))
    with pytest.raises(c.WireError):
        f.taken_from_pb("c", f.open_to_pb(_open(b"abcd")))


def test_a_fetch_outside_its_tokens_is_a_wire_error() -> None:
    with pytest.raises(c.WireError, match=r"\[0, 3\) of 2 tokens"):
        f.open_from_pb(f.open_to_pb(replace(_open(b"abcdabcd"), end=3)))


@pytest.mark.parametrize(
    ("points", "words"),
    [([(4, 1.0), (4, 2.0)], "ascend"), ([(1, -1.0)], "milliseconds"), ([(1, float("nan"))], "milliseconds")],
)
def test_a_profile_that_says_nothing_is_a_wire_error(points: list[tuple[int, float]], words: str) -> None:
    message = c.info_to_pb(
        types.WorkerInfo(worker_id="w", incarnation="i", epoch=1, role="decode", state="ready", address="")
    )
    for count, ms in points:
        message.profile.prefill.add(count=count, ms=ms)
    with pytest.raises(c.WireError, match=words):
        c.info_from_pb(message)


@pytest.mark.parametrize("rate", [{"gb_per_s": 0.0}, {"latency_ms": -1.0}, {"transport": "carrier pigeon"}], ids=str)
def test_a_peer_rate_that_says_nothing_is_a_wire_error(rate: dict[str, Any]) -> None:
    good = {"peer_id": "d", "transport": "local", "gb_per_s": 1.0, "latency_ms": 0.1}
    info = c.info_to_pb(
        types.WorkerInfo(worker_id="w", incarnation="i", epoch=1, role="decode", state="ready", address="")
    )
    beat = worker_pb2.Heartbeat(info=info, peers=[worker_pb2.PeerRate(**{**good, **rate})])
    with pytest.raises(c.WireError, match="a peer's rate"):
        c.worker_message_from_pb(worker_pb2.WorkerMessage(heartbeat=beat))
