"""The HTTP edge: which OpenAI routes a pool answers, and the one place where an error becomes a status and a body.

Does not generate, tokenize or check a prompt's length: the replica does, and its refusal passes through here.
Called by: serving/app.py. Calls: Ray Serve LLM's public ingress, which this configures.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.llm._internal.serve.core.configs.openai_api_models import (  # Ray's own examples take these from here
    ModelCard,
    ModelList,
    OpenAIHTTPException,
    to_model_metadata,
)
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.exceptions import HTTPException  # FastAPI's own is a kind of it
from vllm.exceptions import VLLMClientError

ROUTES = {
    "models": lambda app: app.get("/v1/models", response_model=ModelList),
    "model_data": lambda app: app.get("/v1/models/{model:path}", response_model=ModelCard),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}

_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error", 408: "timeout_error", 503: "overloaded_error"}


def build_ingress() -> type:
    """The ingress class of a pool, with our routes and our error bodies."""
    app = FastAPI(title="SwiftKV", docs_url=None, redoc_url=None)
    add_error_answers(app)
    ingress: type = make_fastapi_ingress(OpenAiIngress, endpoint_map=ROUTES, app=app)
    return ingress


def build_model_card(config: LLMConfig) -> ModelCard:
    """What /v1/models says of the model."""
    return to_model_metadata(config.model_id, config)


def add_error_answers(app: FastAPI) -> None:
    """Makes `app` answer every error with `answer_error`."""
    for error_class in (HTTPException, RequestValidationError, OpenAIHTTPException, VLLMClientError, Exception):
        app.add_exception_handler(error_class, answer_error)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The error as OpenAI writes it: {"error": {"message", "type", "param", "code"}}, `code` the status in digits."""
    status, message, param = describe_error(error)
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": str(status)}}
    return JSONResponse(body, status_code=status)


def describe_error(error: Exception) -> tuple[int, str, Any]:
    """Status, message and offending parameter of an error. What the client did not cause is 500 and unexplained."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return 400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}.", None
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return 400, f"{place or 'body'}: {first['msg']}", place or None
    if isinstance(error, OpenAIHTTPException):
        return int(error.status_code), error.message, None
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    if isinstance(error, VLLMClientError):
        return 400, str(error), None
    return 500, "internal error; the server's log has the details.", None
