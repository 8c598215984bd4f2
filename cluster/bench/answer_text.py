"""What a kept reply says: the chunked framing taken off, the events parsed, texts, usage and errors read. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import orjson


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`pieces` are the texts of the events that brought text, in order; `num_tokens` the usage's."""

    pieces: tuple[str, ...] = ()
    num_tokens: int | None = None
    finish_reason: str | None = None
    error: str = ""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


def body_of(raw: bytes) -> bytes:
    """The body of an HTTP answer, with chunks joined. What is cut off is returned as far as it came."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    parts: list[bytes] = []
    position = 0
    while True:
        end = rest.find(b"\r\n", position)
        size = rest[position:end].partition(b";")[0].strip() if end > 0 else b"0"
        try:
            length = int(size, 16)
        except ValueError:
            length = 0
        if not length:
            return b"".join(parts)
        parts.append(rest[end + 2 : end + 2 + length])
        position = end + 2 + length + 2


def read_answer(raw: bytes) -> Answer:
    """Parse every event of choice 0. An error event or an error body names its code."""
    body = body_of(raw)
    pieces: list[str] = []
    num_tokens: int | None = None
    finish_reason: str | None = None
    for line in body.splitlines() if b"data:" in body else [b"data: " + body]:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data.startswith(b"{"):
            continue
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            return Answer(pieces=tuple(pieces), error="not JSON")
        if error := event.get("error"):
            return Answer(pieces=tuple(pieces), error=_code(error))
        if usage := event.get("usage"):
            num_tokens = usage.get("completion_tokens")
        for choice in event.get("choices", ())[:1]:
            delta = choice.get("delta") or choice
            text = delta.get("content") or delta.get("text") or delta.get("reasoning_content") or ""
            finish_reason = choice.get("finish_reason") or finish_reason
            if text:
                pieces.append(text)
    return Answer(pieces=tuple(pieces), num_tokens=num_tokens, finish_reason=finish_reason)


def _code(error: object) -> str:
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or error.get("message"))
    return str(error)
