"""A client of bare sockets, which sends what it likes and leaves when it likes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx


def request(url: str, path: str, body: Any, **headers: str) -> bytes:
    """The bytes of a POST whose connection ends with its answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {httpx.URL(url).netloc.decode()}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def ask(url: str, sent: bytes, most: int = -1) -> bytes:
    """Send a request and read its answer, or so many bytes of it; then hang up. Returns what was read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    try:
        writer.write(sent)
        await writer.drain()
        return await reader.read() if most < 0 else await reader.readexactly(most)
    except asyncio.IncompleteReadError as error:
        return error.partial
    finally:
        writer.close()
