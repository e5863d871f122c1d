"""Passes a version's answer on to the client, taking the token counts out of it on the way.

A streamed chunk is looked at as text; only the last one, with the usage, is read as JSON. An answer that breaks off is
ended by an error event: no stream is silently short.
Called by: gateway/generation.py.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

from starlette.types import Send

from swiftkv.serving.gateway.conform import write_answer, write_chunk, write_error
from swiftkv.serving.gateway.exchange import Exchange, Usage
from swiftkv.serving.gateway.refusals import Refusal, refuse
from swiftkv.serving.gateway.upstream import ERROR_EVENT, Answer

DONE = "data: [DONE]"
_NO_CHOICES = '"choices":[]'
logger = logging.getLogger(__name__)

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_JSON = [(b"content-type", b"application/json")]


class Stream:
    """An answer in chunks, as server-sent events."""

    def __init__(self, exchange: Exchange, answer: Answer, keeps_usage: bool, send: Send) -> None:
        """`keeps_usage`: the client asked for the usage chunk, which the gateway always asks for."""
        self._exchange = exchange
        self._answer = answer
        self._keeps_usage = keeps_usage
        self._send = send
        self.is_open = False
        self.is_whole = False
        """Whether the client has everything: if it leaves now, it has left nothing behind."""
        self._is_told = False
        self.num_chunks = 0

    async def relay(self) -> None:
        """Sends everything. Raises: what the version raises, after which `break_off` is due if the stream is open."""
        await self._send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})
        self.is_open = True
        item = self._answer.first
        while not self.is_whole:
            if chunk := "".join(self._read(item)):
                await self._send_part(chunk.encode())
            try:
                item = await self._answer.next()
            except StopAsyncIteration:
                break
            except Exception as error:
                if not self.is_whole:
                    raise
                logger.warning("a version failed after its last word: %s", type(error).__name__)
        if not self.is_whole:
            if not self._is_told:
                raise refuse(500, "the engine's answer broke off.", "stream_cut")
            self.is_whole = True
            await self._send_part(b"")

    async def break_off(self, refusal: Refusal) -> None:
        """Ends the open stream by telling why it is short."""
        self.is_open = False
        self._exchange.reason = refusal.code or refusal.kind
        self.is_whole = True
        await self._send_part(b"data: " + refusal.body() + b"\n\n")

    async def _send_part(self, body: bytes) -> None:
        """A part of the answer, the last one if the answer is whole now."""
        self.is_open = self.is_open and not self.is_whole
        await self._send({"type": "http.response.body", "body": body, "more_body": not self.is_whole})

    def _read(self, item: Any) -> Iterator[str]:
        """The events of an item that the client is to get."""
        for event in _split(item):
            if event.startswith(DONE):
                self.is_whole = True
            elif event.startswith(ERROR_EVENT):
                self._is_told = True
                self._exchange.reason = "engine_error"
                event = write_error(event)
            elif _NO_CHOICES in event and (usage := _find_usage(event)):
                self._exchange.usage = usage
                if not self._keeps_usage:
                    continue
            else:
                self.num_chunks += 1
                event = write_chunk(event)
            yield event


async def send_whole(exchange: Exchange, response: Any, send: Send) -> None:
    """An answer in one piece."""
    if usage := getattr(response, "usage", None):
        exchange.usage = _read_usage(usage.model_dump())
    body = write_answer(response)
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [*_JSON, length]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _split(item: Any) -> Iterator[str]:
    for part in item if isinstance(item, list) else (item,):
        text = part if isinstance(part, str) else f"data: {part.model_dump_json()}\n\n"
        if text.find("\n\n") == len(text) - 2:  # one event, as always with vLLM
            yield text
        else:
            yield from (event + "\n\n" for event in text.split("\n\n") if event)


def _find_usage(event: str) -> Usage | None:
    values = json.loads(event.removeprefix("data: "))
    return None if values.get("choices") or not values.get("usage") else _read_usage(values["usage"])


def _read_usage(values: dict[str, Any]) -> Usage:
    details = values.get("prompt_tokens_details") or {}
    return Usage(
        prompt=values.get("prompt_tokens") or 0,
        cached=details.get("cached_tokens") or 0,
        completion=values.get("completion_tokens") or 0,
    )
