"""The client's side of one request: its body, and noticing that it has left.

Called by: gateway/generation.py.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Receive

from swiftkv.serving.gateway.exchange import CLIENT_LEFT, Exchange
from swiftkv.serving.gateway.refusals import Refusal, refuse


class ClientLeft(Exception):
    """Before its body had come whole."""


def check_length(headers: Headers, max_bytes: int) -> None:
    """Refuses a body by what its header says, before any of it is read.

    Raises: Refusal 413.
    """
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _refuse_long(max_bytes)


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises: Refusal 413; ClientLeft.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _refuse_long(max_bytes)
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def run_while_connected(
    exchange: Exchange, answering: asyncio.Task[None], receive: Receive, has_everything: Callable[[], bool]
) -> None:
    """Waits for the answer to be sent, and cancels it if the client leaves before it has everything.

    Raises: what answering raises.
    """
    leaving = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and has_everything():
            await asyncio.wait({answering})
        if answering.done():
            answering.result()
    finally:
        leaving.cancel()
        if not answering.done():
            answering.cancel()
            with suppress(asyncio.CancelledError, Refusal):
                await answering
            exchange.status, exchange.reason = CLIENT_LEFT, "client_left"


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _refuse_long(max_bytes: int) -> Refusal:
    return refuse(413, f"the body is longer than {max_bytes} bytes.", "body_too_large")
