"""One request with a body, from its key to the last byte of its answer.

The order is fixed: size, key, JSON, model, fields, quota, queue, version, answer. While it runs, the client is watched;
when it leaves, the version's work is stopped.
Called by: gateway/routes.py.
Calls: gateway/connection.py, tenants.py, parsing.py, admission_client.py, upstream.py, relay.py, comparing.py, in
that order.
"""

import asyncio
import logging
import math
import time
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.generate.base.protocol import StreamOptions

from swiftkv.engine.scheduler_names import TENANT_KEY
from swiftkv.serving.gateway.connection import ClientLeft, check_length, read_body, run_while_connected
from swiftkv.serving.gateway.exchange import CLIENT_LEFT, Exchange, Usage
from swiftkv.serving.gateway.gateway import Gateway
from swiftkv.serving.gateway.outcomes import Outcome
from swiftkv.serving.gateway.parsing import TOKENIZE, TOKENIZE_CHAT, Kind, measure, parse_json, parse_request
from swiftkv.serving.gateway.refusals import Refusal, refuse
from swiftkv.serving.gateway.relay import Stream, send_whole
from swiftkv.serving.gateway.settings import Limits
from swiftkv.serving.gateway.tenants import PRIORITIES, Tenant
from swiftkv.serving.gateway.tickets import Ticket
from swiftkv.serving.gateway.upstream import Answer, describe_failure

TIMEOUT_HEADER = "x-request-timeout-s"

LAST_WORD_S = 1.0
"""Seconds in which a slow client can still take the event that ends its stream."""

logger = logging.getLogger(__name__)


class Generation:
    """An ASGI application for one request: it is its own response, so that nothing is buffered on the way."""

    def __init__(self, gateway: Gateway, kind: Kind, exchange: Exchange) -> None:
        self._gateway = gateway
        self._kind = kind
        self._exchange = exchange
        self._id = f"{exchange.request_id}-{exchange.id}"  # a client may use its own id twice at once
        self._stream: Stream | None = None
        self._asked_s = 0.0
        self._first_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: Refusal, as long as nothing has been sent."""
        headers = Headers(scope=scope)
        max_bytes = self._gateway.settings.limits.max_body_bytes
        check_length(headers, max_bytes)
        tenant = self._gateway.tenants.find(headers.get("authorization"))
        self._exchange.tenant = tenant.name
        try:
            async with asyncio.timeout(self._gateway.settings.limits.deadline_s):
                body = await read_body(receive, max_bytes)
        except ClientLeft:
            self._exchange.status, self._exchange.reason = CLIENT_LEFT, "client_left"
            return
        except TimeoutError:
            raise _refuse_late(None) from None
        answering = asyncio.create_task(self._answer(tenant, headers, body, send))
        await run_while_connected(self._exchange, answering, receive, self._is_whole)

    async def _answer(self, tenant: Tenant, headers: Headers, body: bytes, send: Send) -> None:
        request, ticket = self._read(tenant, body)
        asked_s = read_timeout(headers.get(TIMEOUT_HEADER), self._gateway.settings.limits)
        left_s = (asked_s or self._gateway.settings.limits.deadline_s) - self._exchange.elapsed_s()
        deadline = asyncio.timeout(max(0.0, left_s))
        try:
            async with deadline:
                await self._take_place(_with_deadline(ticket, deadline))
                keeps_usage = self._prepare(request, tenant)
                answer = await self._call(request, deadline)
                try:
                    await self._send(request, answer, keeps_usage, send)
                finally:
                    answer.cancel()
            if self._exchange.reason is None and self._kind.generates:
                self._exchange.ended_s = self._exchange.elapsed_s()
            self._note_outcome(is_failed=self._exchange.reason is not None)
            if ticket.sequences == 1:
                model = self._gateway.settings.models[self._exchange.model]
                self._gateway.comparer.consider(model, self._kind.method, request)
        except Exception as error:
            refusal = _refuse_late(asked_s) if deadline.expired() else self._describe(error)
            self._note_outcome(is_failed=True)
            if self._stream is None or not self._stream.is_open:
                raise refusal from error
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await self._stream.break_off(refusal)
        finally:
            self._gateway.admission.finish(self._id, self._count_usage(ticket))

    def _is_whole(self) -> bool:
        return self._stream is not None and self._stream.is_whole

    def _read(self, tenant: Tenant, body: bytes) -> tuple[Any, Ticket]:
        values = parse_json(body)
        model = self._gateway.choose_model(values.get("model"), tenant)
        self._exchange.model = values["model"] = model
        of_model = self._gateway.settings.models[model]
        self._exchange.targets, self._exchange.prices = of_model.targets, of_model.prices
        if self._kind is TOKENIZE and "messages" in values:
            self._kind = TOKENIZE_CHAT
        request = parse_request(self._kind, values)
        size = measure(self._kind, request, len(body), self._gateway.settings.limits)
        ticket = Ticket(
            id=self._id,
            gateway=self._gateway.name,
            model=model,
            tenant=tenant.name,
            prompt_tokens=size.prompt_tokens,
            output_tokens=size.output_tokens,
            sequences=size.sequences,
            streams=bool(self._kind.generates and request.stream),
            priority=PRIORITIES.index(tenant.priority),
            weight=tenant.weight,
            requests_per_minute=tenant.requests_per_minute,
            tokens_per_minute=tenant.tokens_per_minute,
        )
        return request, ticket

    async def _take_place(self, ticket: Ticket) -> None:
        asked_s = self._exchange.elapsed_s()
        with self._exchange.span.begin("queue"):
            decision = await self._gateway.admission.acquire(ticket)
        self._exchange.queue_s = self._exchange.elapsed_s() - asked_s
        retry = {name: decision.headers[name] for name in decision.headers if name == "Retry-After"}
        self._exchange.headers = {k: v for k, v in decision.headers.items() if k not in retry}
        if not decision.is_granted:
            if decision.code == "deadline":
                await asyncio.Event().wait()  # for the request's own deadline, in the same moment
            refusal = refuse(decision.status, decision.message, decision.code)
            refusal.headers.update(retry)
            raise refusal

    def _prepare(self, request: Any, tenant: Tenant) -> bool:
        """Sets what the engine must have; returns whether the client wants the usage chunk itself."""
        if not self._kind.generates:
            return False
        request.request_id = self._id
        request.cache_salt = self._gateway.salt(tenant, request.cache_salt)
        request.vllm_xargs = {**(request.vllm_xargs or {}), TENANT_KEY: tenant.name}
        if not request.stream:
            return False
        keeps_usage = bool(request.stream_options and request.stream_options.include_usage)
        if not keeps_usage:
            request.stream_options = StreamOptions(include_usage=True)
        return keeps_usage

    async def _call(self, request: Any, deadline: asyncio.Timeout) -> Answer:
        passed_on = {"x-request-id": self._id, TIMEOUT_HEADER: f"{_left_s(deadline):.3f}"}
        passed_on |= self._exchange.span.list_headers()
        model = self._gateway.settings.models[self._exchange.model]
        return await self._gateway.upstream.call(
            model, self._exchange.request_id, self._kind.method, request, passed_on, self._note_attempt
        )

    def _note_attempt(self, application: str) -> None:
        """A version is asked: the one before it, if there was one, has failed."""
        self._note_outcome(is_failed=True)
        self._exchange.application = application
        self._asked_s = time.monotonic()
        self._gateway.admission.assign(self._id, application)

    def _note_outcome(self, is_failed: bool) -> None:
        application = self._exchange.application
        if application is None or not self._kind.generates:
            return
        ttft_s = tpot_s = None
        tokens, now = self._exchange.usage.completion, time.monotonic()
        if is_failed:
            pass
        elif self._first_s is None:
            tpot_s = (now - self._asked_s) / tokens if tokens else None
        else:
            ttft_s = self._first_s - self._asked_s
            tpot_s = (now - self._first_s) / (tokens - 1) if tokens > 1 else None
        self._gateway.admission.note(Outcome(application, is_failed, ttft_s, tpot_s))

    async def _send(self, request: Any, answer: Answer, keeps_usage: bool, send: Send) -> None:
        if self._kind.generates and request.stream:
            self._exchange.ttft_s = self._exchange.elapsed_s()
            self._first_s = time.monotonic()
            self._gateway.admission.start(self._id)
            self._stream = Stream(self._exchange, answer, keeps_usage, send)
            await self._stream.relay()
        else:
            with suppress(StopAsyncIteration):
                await answer.next()  # to its end: cancelled later, it would count as a client that left
            await send_whole(self._exchange, answer.whole, send)

    def _describe(self, error: Exception) -> Refusal:
        refusal = error if isinstance(error, Refusal) else describe_failure(error)
        if refusal.status >= 500:
            logger.error("request %s failed", self._exchange.request_id, exc_info=error)
        return refusal

    def _count_usage(self, ticket: Ticket) -> int:
        """Tokens that count against the tenant's quota: the engine's count, or an estimate where an answer was cut."""
        exchange = self._exchange
        if not exchange.usage.total and self._stream is not None:
            exchange.usage = Usage(prompt=ticket.prompt_tokens, completion=self._stream.num_chunks)
        return exchange.usage.total


def read_timeout(given: str | None, limits: Limits) -> float | None:
    """Seconds that the client gives the request, None if it says nothing.

    Raises: Refusal 400.
    """
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= limits.max_deadline_s:
        message = f"{TIMEOUT_HEADER} is {given[:50]!r}; it can be seconds up to {limits.max_deadline_s:g}."
        raise refuse(400, message, param=TIMEOUT_HEADER)
    return timeout_s


def _with_deadline(ticket: Ticket, deadline: asyncio.Timeout) -> Ticket:
    values = {name: getattr(ticket, name) for name in Ticket.__slots__}
    return Ticket(**values | {"deadline_s": _left_s(deadline)})


def _left_s(deadline: asyncio.Timeout) -> float:
    ends_s = deadline.when()
    assert ends_s is not None
    return max(0.0, ends_s - asyncio.get_running_loop().time())


def _refuse_late(asked_s: float | None) -> Refusal:
    if asked_s is None:
        return refuse(504, "the request took longer than a request may.", "deadline")
    return refuse(408, f"the request took longer than the {asked_s:g} s that it was given.", "deadline")
