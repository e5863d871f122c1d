"""The decode replica: takes a request, has its prompt prefilled where that is cheaper, and answers it.

Ray Serve LLM's decode server passes a failed prefill on to the client; this one then prefills the prompt itself, so
a prefill pool that is empty, cold or broken makes answers slower and never takes them away. Generates nothing itself:
both engines are vLLM's, and KV moves between them by NIXL.
Called by: Ray Serve, as built in serving/pools.py.
Calls: serving/hop.py, serving/workload.py, serving/engine.py, serving/fetching.py, serving/engine_log.py,
serving/tracing.py, Ray Serve LLM's decode server.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer, PDDecodeServer

from swiftkv.engine.side_channel import choose_side_channel
from swiftkv.metrics import count, observe, record
from swiftkv.serving import tracing
from swiftkv.serving.config import HopSettings
from swiftkv.serving.engine import PoolEngine
from swiftkv.serving.engine_log import EngineLog
from swiftkv.serving.fetching import Fetching
from swiftkv.serving.hop import Beginnings, HopCosts, SeenPrefixes
from swiftkv.serving.prompts import (
    TokenLengths,
    count_cached,
    count_sequences,
    leave_only_prompt,
    read_prompt,
    tell_cached,
)
from swiftkv.serving.tokenizing import Tokenizing
from swiftkv.serving.workload import DecodeWorkload, Served

logger = logging.getLogger(__name__)


@dataclass
class Prompt:
    """What is known of a request's prompt before it is tokenised."""

    text: str
    """Of all messages, or the token ids written out: for comparing beginnings."""
    tokens: float
    """Estimated, or counted where the request has token ids."""
    uncached: float
    """Of these, not in this engine's cache."""
    salt: str
    """Only prompts of equal salt share KV."""
    cached_elsewhere: int = 0
    """Tokens, of one that was handed over, that the prefill replica had in its cache."""


class DecodeServer(Fetching, Tokenizing, PDDecodeServer):
    """A decode engine that asks the prefill pool for help where it pays."""

    async def __init__(  # type: ignore[misc]  # as Ray has it
        self, llm_config: LLMConfig, *, prefill_server: Any, hop: HopSettings, kv_capacity_tokens: float, **others: Any
    ) -> None:
        self._costs = HopCosts(hop)
        self._lengths = TokenLengths()
        self._seen = SeenPrefixes(hop.remembered_characters)
        self._beginnings = Beginnings()
        self._avoided_until = 0.0
        self._is_failing = False
        self._asked_at = 0.0
        self._workload = DecodeWorkload(kv_capacity_tokens)
        os.environ.update(choose_side_channel(ray.util.get_node_ip_address()))  # see PrefillServer
        await super().__init__(llm_config, prefill_server=prefill_server, engine_cls=PoolEngine, **others)
        self._engine_log = EngineLog.find()
        self._application = serve.get_replica_context().app_name

    async def _pd_handle_request(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """The answer's chunks. Overrides the one place where Ray's server joins both pools."""
        # Not by its class: Ray has two of each, and the gateway sends the other one than Ray's public name means.
        method = "chat" if hasattr(request, "messages") else "completions"
        span = tracing.begin_span("decode", getattr(raw_request_info, "headers", None))
        self._see_begun()
        prompt = self._measure_prompt(request)
        started = time.monotonic()
        served = self._plan(request, prompt)
        # Before the pool is asked: demand counts when it arrives, not when a full or empty pool has let it through.
        self._workload.begin(served)
        observe("swiftkv_arrived_prompt_tokens", prompt.tokens, application=self._application)
        handed_over, decoded = 0.0, request
        try:
            if served.is_remote:
                with span.begin("hop", is_call=True) as hop:
                    asked = hop.pass_on(raw_request_info)
                    handed_over, decoded = await self._prefill_remotely(method, request, asked, prompt)
                    hop.note(taken=bool(handed_over))
                served.is_remote = bool(handed_over)
                started = time.monotonic()  # what a failed pool cost is not what prefilling here costs
            count("swiftkv_hop_prompts_total", 1, way="remote" if handed_over else "local")
            async for chunk in self._decode(method, request, decoded, raw_request_info, span):
                is_first = not served.completion_tokens
                self._workload.take_chunk(served, _count_tokens(chunk))
                # A whole answer comes at once, so its first chunk tells nothing about the first token.
                if is_first and served.is_streamed:
                    self._note_first_token(prompt, handed_over, started)
                yield tell_cached(chunk, prompt.cached_elsewhere) if handed_over else chunk
        finally:
            if served.completion_tokens:
                self._seen.add(prompt.text, prompt.salt)
            self._workload.end(served)
            span.end({"way": "remote" if handed_over else "local", "uncached_tokens": round(prompt.uncached)})

    async def _decode(
        self, method: str, request: Any, decoded: Any, raw_request_info: Any, span: tracing.Span
    ) -> AsyncGenerator[Any, None]:
        """The engine's chunks of `decoded`, or of `request` itself if the KV that it is to take does not come."""
        has_kv = decoded is not request
        chunks = await getattr(LLMServer, method)(self, decoded, span.pass_on(raw_request_info, has_kv))
        if has_kv:
            try:
                yield await self._take_first(decoded, chunks)
            except TimeoutError:
                # The engine keeps the blocks for which KV was to come until NIXL has let go of them.
                self._avoid_prefill_pool("its KV did not come")
                chunks = await getattr(LLMServer, method)(self, request, span.pass_on(raw_request_info))
        async for chunk in chunks:
            yield chunk

    async def _take_first(self, request: Any, chunks: AsyncGenerator[Any, None]) -> Any:
        """The first chunk. Raises: TimeoutError if there is no token in time; the engine has then dropped it."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as deadline:

            def give_up() -> None:
                if not self._has_begun(request.request_id):
                    deadline.reschedule(loop.time())

            timer = loop.call_later(self._costs.settings.transfer_timeout_s, give_up)
            try:
                first = await anext(chunks)
            finally:
                timer.cancel()
        if deadline.expired():  # vLLM answers a cancelled whole request with an error instead of raising
            raise TimeoutError
        return first

    def _has_begun(self, request_id: str) -> bool:
        """Whether the engine has made a token of the request: an answer that is sent whole does not show it."""
        return any(request_id in begun for begun in self._list_begun())

    def _list_begun(self) -> list[str]:
        """vLLM's ids of the requests of which its engine has made a token; they contain those of the requests."""
        states = self.engine._engine_client.output_processor.request_states.values()
        return [state.external_req_id for state in states if not state.is_prefilling]

    def _see_begun(self) -> None:
        """Tells the workload which whole answers have begun."""
        if asked := self._workload.list_unseen():
            begun = self._list_begun()
            self._workload.note_begun({asked_id for asked_id in asked if any(asked_id in other for other in begun)})

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the policy is to know of this replica."""
        self._see_begun()
        return self._workload.report(self._engine_log.kv_usage_frac)

    def _measure_prompt(self, request: Any) -> Prompt:
        text, _ = read_prompt(request)
        tokens, salt = self._lengths.estimate(request), getattr(request, "cache_salt", None) or ""
        seen = self._seen.count_seen(text, salt) / max(1, len(text))
        return Prompt(text, tokens, tokens * (1 - seen), salt)

    def _plan(self, request: Any, prompt: Prompt) -> Served:
        """Where the prompt is prefilled, and where it would be if the prefill pool were as it should be."""
        now, running, waiting = time.monotonic(), self._workload.num_running, self._workload.waiting_tokens
        record("swiftkv_hop_break_even_tokens", min(self._costs.find_break_even(running, waiting), 1e9))
        can_hop = count_sequences(request) == 1  # one answer hands over one sequence's KV
        is_remote = can_hop and self._chooses_remote(prompt, now) and self._may_ask(now)
        return Served(
            prompt.tokens,
            prompt.uncached,
            is_remote,
            is_remote or (can_hop and self._costs.is_for_prefill_pool(prompt.uncached, running, waiting)),
            request_id=getattr(request, "request_id", None),
            is_streamed=bool(getattr(request, "stream", False)),
        )

    async def _prefill_remotely(
        self, method: str, request: Any, raw_request_info: Any, prompt: Prompt
    ) -> tuple[float, Any]:
        """When the prefill pool answered (0 if it failed), and the request to decode."""
        costs, now = self._costs, time.monotonic()
        self._asked_at = now
        backend = self._get_connector_backend()
        asked = leave_only_prompt(backend.prepare_prefill_request(request=request, peer=None))
        try:
            with self._beginnings.hold(prompt.text, prompt.salt) as beginning:
                answer = await self._ask_prefill_pool(method, asked, raw_request_info, beginning)
        except Exception as error:  # whatever it was, this engine can still answer
            self._avoid_prefill_pool(repr(error))
            return 0.0, request
        self._is_failing, self._avoided_until = False, 0.0
        if not getattr(answer, "kv_transfer_params", None):
            # An error of the request's own comes again from this engine, with its reason.
            logger.warning("prefill pool returned no KV: %s", type(answer).__name__)
            return 0.0, request
        finished = time.monotonic()
        costs.add_remote(prompt.uncached, finished - now)
        self._lengths.learn(request, answer)
        prompt.cached_elsewhere = count_cached(answer)
        return finished, backend.prepare_decode_request(request=request, peer=None, prefill_response=answer)

    async def _ask_prefill_pool(self, method: str, asked: Any, raw_request_info: Any, beginning: str | None) -> Any:
        """Its answer. Raises: TimeoutError, and whatever Ray raises of a replica that is gone."""
        handle = self._prefill_handle.options(session_id=beginning) if beginning else self._prefill_handle
        answers = getattr(handle, method).remote(asked, raw_request_info)
        try:
            return await asyncio.wait_for(anext(aiter(answers)), self._costs.settings.timeout_s)
        except BaseException:
            with suppress(Exception):
                answers.cancel()
            raise

    def _chooses_remote(self, prompt: Prompt, now: float) -> bool:
        if self._costs.choose_remote(prompt.uncached, self._workload.num_running, self._workload.waiting_tokens):
            return True
        # A pool that was slow once would never be seen to have become fast again.
        settings = self._costs.settings
        is_old = now - self._asked_at > settings.remeasure_s
        return settings.min_tokens is None and is_old and prompt.uncached >= settings.min_tokens_unmeasured

    def _may_ask(self, now: float) -> bool:
        if now < self._avoided_until:
            return False
        if self._is_failing:  # one prompt finds out for all: a pool without replicas lets it wait until it times out
            self._avoided_until = now + self._costs.settings.timeout_s
        return True

    def _avoid_prefill_pool(self, reason: str) -> None:
        self._is_failing = True
        self._avoided_until = time.monotonic() + self._costs.settings.retry_s
        count("swiftkv_hop_failures_total", 1)
        logger.warning("prefilling here for %.0f s: the prefill pool failed: %s", self._costs.settings.retry_s, reason)

    def _note_first_token(self, prompt: Prompt, handed_over: float, started: float) -> None:
        now = time.monotonic()
        if handed_over:
            self._costs.transfer.add(prompt.uncached, now - handed_over)
        elif not self._workload.waiting_tokens:
            # No other prompt is in it. What running sequences add is little beside a prompt, and a pool that is never
            # idle would otherwise never learn.
            self._costs.local.add(prompt.uncached, now - started)


def _count_tokens(chunk: Any) -> int:
    """Tokens in an item of an answer: an event of a stream has one, a whole answer says how many."""
    usage = getattr(chunk, "usage", None)
    if usage is not None:
        return max(1, usage.completion_tokens or 0)
    return max(1, len(chunk)) if isinstance(chunk, list) else 1
