"""One streamed completion over its own connection, timed. Parses only what it counts, so as not to be the limit."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one request did. Times are seconds since it was sent; `error` is empty if it ended well."""

    first_token_s: float = 0.0
    total_s: float = 0.0
    num_tokens: int = 0
    error: str = ""


async def stream_completion(host: str, port: int, body: dict[str, object], *, api_key: str = "") -> Outcome:
    """Run one request to its end. Never raises for what a server or a network can do."""
    started = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return Outcome(error=f"connect: {error.strerror}")
    try:
        payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(payload)}\r\n"
        head += "Content-Type: application/json\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {api_key}\r\n\r\n" if api_key else "\r\n"
        writer.write(head.encode() + payload)
        await writer.drain()
        return await _read_events(reader, started)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        return Outcome(error=f"{type(error).__name__}: {error}", total_s=time.perf_counter() - started)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, started: float) -> Outcome:
    """From the status line to [DONE]. Chunk sizes are skipped: no line of ours looks like an event but an event."""
    status = (await reader.readline()).split(b" ", 2)[1:2]
    first_token_s = 0.0
    num_tokens = 0
    async for line in reader:
        now = time.perf_counter() - started
        if status != [b"200"]:
            continue
        if line.startswith(b"data: [DONE]"):
            return Outcome(first_token_s=first_token_s, total_s=now, num_tokens=num_tokens)
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return Outcome(error=str(event["error"].get("code")), total_s=now)
        if event.get("choices") and not first_token_s:
            first_token_s = now
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    words = b"".join(status).decode(errors="replace")
    return Outcome(error="cut off" if words == "200" else f"HTTP {words}", total_s=time.perf_counter() - started)
