"""The gateway's HTTP routes.

Each is a few lines: what a request with a body goes through is in generation.py, what surrounds each in edge.py.
Called by: gateway/app.py. Calls: gateway/generation.py, gateway/openapi.py.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from swiftkv import __version__
from swiftkv.serving.gateway.edge import Edge, answer_refusal
from swiftkv.serving.gateway.gateway import Gateway
from swiftkv.serving.gateway.generation import Generation
from swiftkv.serving.gateway.openapi import ERRORS, describe_body, install_document
from swiftkv.serving.gateway.parsing import CHAT, COMPLETIONS, TOKENIZE, TOKENIZE_CHAT, Kind
from swiftkv.serving.gateway.refusals import Refusal, refuse
from swiftkv.serving.gateway.tenants import Tenant


def build_routes(gateway: Gateway) -> FastAPI:
    """The ASGI application of one gateway process."""
    app = FastAPI(title="SwiftKV", version=__version__, docs_url=None, redoc_url=None)
    for error_class in (Refusal, HTTPException, RequestValidationError):
        app.add_exception_handler(error_class, answer_refusal)
    app.add_middleware(Edge, on_end=gateway.note_end)
    _add_bodies(app, gateway)
    _add_models(app, gateway)
    _add_health(app, gateway)
    install_document(app, CHAT, COMPLETIONS, TOKENIZE, TOKENIZE_CHAT)
    return app


def _add_bodies(app: FastAPI, gateway: Gateway) -> None:
    def add(path: str, summary: str, *kinds: Kind) -> None:
        async def answer(request: Request) -> Any:
            return _AsResponse(Generation(gateway, kinds[0], request.state.exchange))

        app.post(
            path,
            summary=summary,
            operation_id=path.strip("/").replace("/", "_"),
            openapi_extra=describe_body(*kinds),
            responses=ERRORS,
            response_class=Response,
        )(answer)

    add("/v1/chat/completions", "Answer a conversation, whole or in chunks.", CHAT)
    add("/v1/completions", "Continue a text, whole or in chunks.", COMPLETIONS)
    add("/v1/tokenize", "The model's tokens of a text or a conversation.", TOKENIZE, TOKENIZE_CHAT)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def find_tenant(request: Request) -> Tenant:
        tenant = gateway.tenants.find(request.headers.get("authorization"))
        request.state.exchange.tenant = tenant.name
        return tenant

    @app.get("/v1/models", summary="The models that may be used.", responses=ERRORS)
    async def list_models(request: Request) -> dict[str, Any]:
        return gateway.list_models(find_tenant(request))

    @app.get("/v1/models/{model:path}", summary="One model.", responses=ERRORS)
    async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
        found = gateway.choose_model(model, find_tenant(request))
        request.state.exchange.model = found
        return gateway.describe_model(found)


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", summary="Whether the gateway runs.")
    async def check_health() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/ready", summary="Whether a version of a model answers.", responses=ERRORS)
    async def check_ready() -> JSONResponse:
        if not await gateway.is_ready():
            raise refuse(503, "no version of any model answers.", "unavailable")
        return JSONResponse({"status": "ready"})


class _AsResponse(Response):
    """Hands FastAPI an ASGI application as the response, so that it leaves the body and the answer alone."""

    def __init__(self, application: Generation) -> None:
        self._application = application
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._application(scope, receive, send)
