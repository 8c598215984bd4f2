"""A scripted HTTP server: what it answers is given byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from cluster.bench.load import Target

Script = Callable[[int], Sequence[bytes]]  # number of the request -> parts, each a write of its own; b"" ends in a cut
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def token(text: str) -> bytes:
    return b'data: {"choices": [{"index": 0, "text": "%s"}]}\n\n' % text.encode()


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def about(head: bytes) -> bytes:
    """The answers to GET: one model, and no /metrics."""
    if b"/v1/models" not in head:
        return b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    body = b'{"data": [{"id": "scripted"}]}'
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@asynccontextmanager
async def scripted(script: Script, pause_s: float = 0.0) -> AsyncIterator[Target]:
    """Serve while the context lasts. Connections are kept unless a script ends with an empty part."""
    num_requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_requests
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(about(head))
                    return
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                num_requests += 1
                for part in script(num_requests - 1):
                    if not part:
                        return
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
