"""What waits on a link: order, overtaking, melting, bounds."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.rpc.outbox import MAX_DISPATCH_BYTES, RouterOutbox, WorkerOutbox
from cluster.types import AbortRequest, Choice, Dispatch, Entry, Failed, News, Release, Tokens
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs

# many processes may share this machine's two cores
LOADED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def dispatch(request_id: str, prompt: bytes = b"abcd") -> Dispatch:
    return Dispatch(
        request_id=request_id,
        attempt=1,
        incarnation="i",
        epoch=1,
        prompt=prompt,
        choices=(Choice(index=0, seed=0),),
        params=SamplingParams(),
        remaining_ms=1,
    )


def abort(request_id: str, attempt: int = 1) -> AbortRequest:
    return AbortRequest(request_id=request_id, attempt=attempt)


def drain(outbox: RouterOutbox) -> list[object]:
    return list(iter(outbox.take, None))


def tokens(request_id: str, position: int, *ids: int, choice: int = 0, finish: FinishReason | None = None) -> Tokens:
    return Tokens(
        request_id=request_id, attempt=1, choice=choice, position=position, token_ids=ids, finish_reason=finish
    )


def test_aborts_and_releases_overtake_dispatches() -> None:
    outbox = RouterOutbox()
    release = Release(request_id="c", attempt=1)
    for message in (dispatch("a"), dispatch("b"), abort("z"), release):
        outbox.put(message)
    assert drain(outbox) == [abort("z"), release, dispatch("a"), dispatch("b")]


def test_an_abort_removes_the_dispatch_that_it_overtakes() -> None:
    outbox = RouterOutbox()
    for message in (dispatch("a"), dispatch("b"), abort("a"), abort("b", attempt=2)):
        outbox.put(message)
    assert drain(outbox) == [abort("b", attempt=2), dispatch("b")]
    assert not outbox.is_over


def test_too_many_prompt_bytes_are_over_the_bound_until_taken() -> None:
    outbox = RouterOutbox()
    for i in range(65):
        outbox.put(dispatch(str(i), bytes(MAX_DISPATCH_BYTES // 64)))
    before = outbox.is_over
    outbox.take()
    outbox.take()
    assert (before, outbox.is_over) == (True, False)


def test_tokens_of_a_choice_melt_into_one_entry() -> None:
    outbox = WorkerOutbox(100)
    outbox.put(tokens("a", 0, 1, 2))
    outbox.put(tokens("b", 5, 9))
    outbox.put(tokens("a", 2, 3, finish=FinishReason.STOP))
    assert outbox.take() == (tokens("a", 0, 1, 2, 3, finish=FinishReason.STOP), tokens("b", 5, 9))
    assert outbox.take() == ()


def test_choices_gaps_and_finished_entries_stay_apart() -> None:
    outbox = WorkerOutbox(100)
    entries = (
        tokens("a", 0, 1, choice=0),
        tokens("a", 0, 1, choice=1),
        tokens("a", 7, 1, choice=0, finish=FinishReason.LENGTH),
        tokens("a", 8, 1, choice=0),
        Failed(request_id="a", attempt=1, code="busy"),
    )
    for entry in entries:
        outbox.put(entry)
    assert outbox.take() == entries


def test_only_the_last_news_of_a_request_is_kept() -> None:
    outbox = WorkerOutbox(100)
    for queue_ms in range(5):
        outbox.put(News(request_id="a", attempt=1, stage="queued", queue_ms=queue_ms))
    assert outbox.take() == (News(request_id="a", attempt=1, stage="queued", queue_ms=4),)


def test_logprobs_melt_with_their_tokens() -> None:
    one = TokenLogprobs(logprob=-1.0, top_ids=(1,), top_logprobs=(-1.0,))
    outbox = WorkerOutbox(100)
    for position in range(2):
        outbox.put(
            Tokens(request_id="a", attempt=1, choice=0, position=position, token_ids=(position,), logprobs=(one,))
        )
    (entry,) = outbox.take()
    assert isinstance(entry, Tokens)
    assert (entry.token_ids, entry.logprobs) == ((0, 1), (one, one))


def test_the_bound_counts_tokens_that_nobody_read() -> None:
    outbox = WorkerOutbox(10)
    over = []
    for position in range(10):
        outbox.put(tokens("a", position, 1))
        over.append(outbox.is_over)
    outbox.take()
    assert [*over, outbox.is_over] == [*[False] * 9, True, False]


@LOADED
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.integers(1, 3)) | st.none(), max_size=40))
def test_melting_never_loses_or_reorders_a_choices_tokens(steps: list[tuple[str, int, int] | None]) -> None:
    outbox = WorkerOutbox(10_000)
    sent: dict[tuple[str, int], int] = {}
    got: dict[tuple[str, int], int] = {}

    def read(entries: tuple[Entry, ...]) -> None:
        for entry in entries:
            assert isinstance(entry, Tokens)
            key = (entry.request_id, entry.choice)
            assert entry.position == got.get(key, 0)
            assert entry.token_ids == tuple(range(entry.position, entry.position + len(entry.token_ids)))
            got[key] = entry.position + len(entry.token_ids)

    for step in steps:
        if step is None:
            read(outbox.take())
            continue
        request_id, choice, count = step
        position = sent.get((request_id, choice), 0)
        outbox.put(tokens(request_id, position, *range(position, position + count), choice=choice))
        sent[request_id, choice] = position + count
    read(outbox.take())
    assert got == sent
