"""OpenAI's own schema against the bodies that we answer; where its document is not at hand, a small one of our own.

$SWIFTKV_OPENAI_SCHEMA is the path of OpenAI's openapi.json (API version 2.3.0) with `nullable: true` written as a null
type, as JSON Schema has it. Without it, what is checked is which fields there must be and of which type.
Called by: tests. Calls: jsonschema.
"""

import json
import os
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

VARIABLE = "SWIFTKV_OPENAI_SCHEMA"

_TEXT, _NUMBER, _TEXT_OR_NULL = {"type": "string"}, {"type": "number"}, {"type": ["string", "null"]}


def check_body(name: str, body: Any) -> None:
    """Raises: AssertionError naming each place of the body that the schema of that name does not allow."""
    schema = {"$ref": f"#/components/schemas/{name}", **_load()}
    errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(body)]
    assert not errors, f"{name}: {errors} in {json.dumps(body)[:2000]}"


def _load() -> dict[str, Any]:
    path = os.environ.get(VARIABLE)
    if path is None:
        return {"components": {"schemas": OURS}}
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    # OpenAI's document does not describe streamed completions: its own chunks, but the last, have no finish_reason.
    choice = document["components"]["schemas"]["CreateCompletionResponse"]["properties"]["choices"]["items"]
    choice["properties"]["finish_reason"]["enum"].append(None)
    choice["properties"]["finish_reason"]["type"] = ["string", "null"]
    return {"components": document["components"]}


def _describe(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _const(value: str) -> dict[str, Any]:
    return {"const": value}


_USAGE = _describe({key: {"type": "integer"} for key in ("prompt_tokens", "completion_tokens", "total_tokens")})
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list({"type": "integer"}))}
_TOKENS = _or_null(_list(_describe(_TOKEN | {"top_logprobs": _list(_describe(_TOKEN))})))
_CHAT_LOGPROBS = _or_null(_describe({"content": _TOKENS, "refusal": _TOKENS}))
_COMPLETION_LOGPROBS = _or_null(
    _describe({"tokens": _list(_TEXT), "token_logprobs": _list(_NUMBER), "top_logprobs": _list({"type": "object"})})
)
_CALL = _describe({"name": _TEXT, "arguments": _TEXT})
_CALLS = _list(_describe({"id": _TEXT, "type": _const("function"), "function": _CALL}))
_CALL_PIECES = _list(_describe({"index": {"type": "integer"}}, {"id": _TEXT, "function": {"type": "object"}}))
_MESSAGE = {"role": _const("assistant"), "content": _TEXT_OR_NULL, "refusal": _TEXT_OR_NULL}
_HEAD = {"id": _TEXT, "created": {"type": "integer"}, "model": _TEXT}
_INDEXED = {"index": {"type": "integer"}, "finish_reason": _TEXT_OR_NULL}

OURS: dict[str, Any] = {
    "Model": _describe({"id": _TEXT, "object": _const("model"), "created": {"type": "integer"}, "owned_by": _TEXT}),
    "ListModelsResponse": _describe({"object": _const("list"), "data": _list({"$ref": "#/components/schemas/Model"})}),
    "CreateCompletionResponse": _describe(
        _HEAD
        | {
            "object": _const("text_completion"),
            "choices": _list(_describe(_INDEXED | {"text": _TEXT, "logprobs": _COMPLETION_LOGPROBS})),
        },
        {"usage": _USAGE},
    ),
    "CreateChatCompletionResponse": _describe(
        _HEAD
        | {
            "object": _const("chat.completion"),
            "choices": _list(
                _describe(
                    _INDEXED | {"message": _describe(_MESSAGE, {"tool_calls": _CALLS}), "logprobs": _CHAT_LOGPROBS}
                )
            ),
        },
        {"usage": _USAGE},
    ),
    "CreateChatCompletionStreamResponse": _describe(
        _HEAD
        | {
            "object": _const("chat.completion.chunk"),
            "choices": _list(
                _describe(
                    _INDEXED | {"delta": {"type": "object", "properties": {"tool_calls": _CALL_PIECES}}},
                    {"logprobs": _CHAT_LOGPROBS},
                )
            ),
        },
        {"usage": _or_null(_USAGE)},
    ),
    "ErrorResponse": _describe(
        {"error": _describe({"type": _TEXT, "message": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL})}
    ),
}
"""What we hold ourselves to where OpenAI's document is not at hand, by its names."""
