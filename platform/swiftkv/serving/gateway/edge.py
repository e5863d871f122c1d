"""The outermost layer: every request gets an id, an answer in OpenAI's format, a log line and a span, and is counted.

Plain ASGI, so that chunks pass untouched. Decides nothing about a request.
Called by: Starlette, for every request of the gateway. Calls: gateway/exchange.py, serving/ingress.py,
serving/tracing.py.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swiftkv.serving import tracing
from swiftkv.serving.gateway.exchange import CLIENT_LEFT, Exchange, choose_request_id
from swiftkv.serving.gateway.refusals import Refusal, refuse
from swiftkv.serving.ingress import describe_error

UNLOGGED = {"/health", "/ready"}

APPLICATION_HEADER = "x-swiftkv-application"
"""Of an answer: the version that gave it, as its Serve application is named."""

logger = logging.getLogger(__name__)


class Edge:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, on_end: Callable[[Exchange], None]) -> None:
        """`on_end` is told every request that has ended."""
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan, which passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = choose_request_id(headers.get("x-request-id"))
        exchange = Exchange(request_id, route=f"{scope['method']} {scope['path'][:100]}")
        is_noted = scope["path"] not in UNLOGGED
        if is_noted:
            exchange.span = tracing.begin_span("gateway", headers)
        scope.setdefault("state", {})["exchange"] = exchange
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                exchange.status = message["status"]
                added = {"x-request-id": request_id, **exchange.headers}
                if exchange.application:
                    added[APPLICATION_HEADER] = exchange.application
                message["headers"] = [
                    *message.get("headers", ()),
                    *((k.encode(), v.encode()) for k, v in added.items()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            exchange.status, exchange.reason = CLIENT_LEFT, "client_left"
            raise
        except Exception as error:
            logger.exception("request %s failed", request_id)
            exchange.reason = type(error).__name__
            if not has_started:
                await build_answer(exchange, describe(error))(scope, receive, send_with_id)
        finally:
            if is_noted:
                exchange.end()
                self._on_end(exchange)


async def answer_refusal(request: Request, error: Exception) -> Response:
    """What FastAPI calls for errors that are answers."""
    return build_answer(request.state.exchange, describe(error))


def build_answer(exchange: Exchange, refusal: Refusal) -> Response:
    """The refusal as a response, its reason noted."""
    exchange.reason = refusal.code or exchange.reason or refusal.kind
    return Response(refusal.body(), status_code=refusal.status, headers=refusal.headers, media_type="application/json")


def describe(error: Exception) -> Refusal:
    """Any error as the answer it becomes; what the client did not cause is 500 and unexplained."""
    if isinstance(error, Refusal):
        return error
    status, message, param = describe_error(error)
    refusal = refuse(status, message, param=param)
    refusal.headers.update(_headers_of(error))
    return refusal


def _headers_of(error: Any) -> dict[str, str]:
    return dict(getattr(error, "headers", None) or {})  # of a 405: which methods there are
