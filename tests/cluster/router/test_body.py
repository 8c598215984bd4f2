"""Bodies: limited while they are read, JSON with a bounded depth."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.errors import RequestError, UnavailableError
from cluster.router.body import MAX_JSON_DEPTH, BodyBudget, ClientGone, parse_object, read_body


def read(chunks: list[bytes | None], limit: int, **headers: bytes) -> tuple[bytes, int]:
    """The body and how many chunks were read. None: the client goes."""
    num_read = 0

    async def receive() -> dict[str, Any]:
        nonlocal num_read
        num_read += 1
        chunk = chunks[num_read - 1]
        if chunk is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": num_read < len(chunks)}

    scope = {"headers": [(name.replace("_", "-").encode(), value) for name, value in headers.items()]}
    return asyncio.run(read_body(scope, receive, limit, lambda _: None)), num_read


def test_a_body_within_the_limit_is_whole() -> None:
    assert read([b"ab", b"", b"c"], 3) == (b"abc", 3)


def test_a_declared_length_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(RequestError) as caught:
        read([], 10, content_length=b"11")
    assert caught.value.code == "body_too_large"


def test_a_chunked_body_is_refused_as_soon_as_it_is_over() -> None:
    with pytest.raises(RequestError) as caught:
        read([b"x" * 6] * 100, 10)
    assert caught.value.code == "body_too_large"


def test_before_closing_the_rest_is_read_so_that_the_client_gets_the_answer() -> None:
    with pytest.raises(RequestError):
        read([b"x" * 6] * 100, 10, connection=b"close", content_length=b"600")


def test_a_client_that_goes_is_no_error_of_ours() -> None:
    with pytest.raises(ClientGone):
        read([b"x", None], 10)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": NaN, }',
        b'{"a": NaN, "b": "\\ud800"}', b"{'a': 1}", b'{"a": 1} x', b"[" * 100_000,
        b'{"a": NaN, "b": ' + b"[" * 100_000, b'{"a":' * (MAX_JSON_DEPTH + 1) + b"1" + b"}" * (MAX_JSON_DEPTH + 1),
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_object(body)
    assert caught.value.code == "invalid_json"


def test_nan_passes_so_that_its_field_can_be_named() -> None:
    assert str(parse_object(b'{"temperature": NaN}')["temperature"]) == "nan"


def test_usual_depth_is_fine() -> None:
    depth = MAX_JSON_DEPTH - 1
    parse_object(b'{"a":' * depth + b"1" + b"}" * depth)


def test_all_bodies_together_are_bounded_and_give_back() -> None:
    budget = BodyBudget(100)
    with budget.share() as one, budget.share() as two:
        one(60)
        two(40)
        with pytest.raises(UnavailableError) as caught:
            two(1)
        assert caught.value.code == "overloaded"
    with budget.share() as again:
        again(100)
