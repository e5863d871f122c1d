"""Asks two versions of a model the beginning of the same answer, after the client has its own, and counts how often
they agree.

Both are asked again, greedily and for a few tokens: so the client's answer is not touched, kept or waited for, sampled
requests can be compared too, and the prompt is in the cache of the version that has just had it. Neither prompt nor
answers leave this file, and nothing of them is logged.
Called by: gateway/generation.py. Calls: gateway/upstream.py.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from swiftkv.serving.gateway.outcomes import Compared
from swiftkv.serving.gateway.settings import ModelSettings
from swiftkv.serving.gateway.upstream import Upstream

TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class Comparer:
    """One gateway's comparisons, of which at most one runs at a time: they come on top of what admission allows."""

    def __init__(self, upstream: Upstream, note: Callable[[Compared], None]) -> None:
        """`note` is told each result."""
        self._upstream = upstream
        self._note = note
        self._running: asyncio.Task[None] | None = None

    def consider(self, model: ModelSettings, method: str, request: Any) -> None:
        """Compares the versions on this request, if the sample falls on it. Returns at once."""
        comparison = model.comparison
        if comparison is None or len(model.routes) != 2 or random.random() >= comparison.frac:
            return
        if self._running is None or self._running.done():
            short = shorten(request, method, comparison.tokens)
            applications = [route.application for route in model.routes]
            self._running = asyncio.create_task(self._compare(applications, method, short))

    async def _compare(self, applications: list[str], method: str, request: Any) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                first, second = [await self._ask(name, method, request) for name in applications]
        except Exception as error:  # a version that fails shows it in its clients' requests
            logger.info("versions were not compared: %s", type(error).__name__)
            return
        self._note(Compared(applications[1], first == second))

    async def _ask(self, application: str, method: str, request: Any) -> list[Any]:
        named = request.model_copy(update={"request_id": f"cmp-{secrets.token_hex(12)}"})
        answer = await self._upstream.ask(application, method, named, {})
        with suppress(StopAsyncIteration):
            await answer.next()
        return [_read_text(choice) for choice in answer.whole.choices]


def shorten(request: Any, method: str, tokens: int) -> Any:
    """The request for the first greedy tokens of its answer, whole."""
    changes = {"stream": False, "stream_options": None, "temperature": 0.0, "n": 1, "min_tokens": 0, "logprobs": None}
    if method == "chat":
        changes |= {"logprobs": False, "top_logprobs": None, "max_completion_tokens": tokens}
    return request.model_copy(update=changes | {"max_tokens": tokens})


def _read_text(choice: Any) -> Any:
    message = getattr(choice, "message", None)
    if message is None:
        return choice.text
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content, calls
