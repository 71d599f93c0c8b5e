"""Asks a local HTTP server one question, without a client library."""

import asyncio
import json
from contextlib import suppress
from typing import Any

MOST_BYTES = 1 << 20


async def get(host: str, port: int, path: str, timeout: float = 5.0) -> tuple[int, bytes] | None:
    """(status, body) of `GET path`; None when there is no answer in time. Bodies are cut at 1 MiB."""
    writer = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while len(answer) < MOST_BYTES and (chunk := await reader.read(1 << 16)):
                answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body
    except (OSError, TimeoutError, ValueError, IndexError):
        return None
    finally:
        if writer is not None:
            with suppress(OSError):
                writer.close()


async def get_json(host: str, port: int, path: str, timeout: float = 5.0) -> tuple[int, Any] | None:
    """(status, JSON) of `GET path`; None when there is no such answer in time."""
    answer = await get(host, port, path, timeout)
    try:
        return None if answer is None else (answer[0], json.loads(answer[1]))
    except ValueError:
        return None
