"""Answers as OpenAI's API document has them, where vLLM writes them a little otherwise.

Changes no text, token or number. What vLLM adds to a choice (stop_reason and the like) stays where it has a value.
Called by: gateway/relay.py.
Source: OpenAI's openapi.json 2.3.0; vLLM 0.29, entrypoints/openai/.
"""

import json
from typing import Any

_NULLABLE = frozenset({"logprobs", "finish_reason", "content", "refusal", "bytes"})
"""What is null where there is none. Everything else is then left out: OpenAI's schema has no nulls for it."""

# A quote inside a text is written \\", so this can only be vLLM's own. OpenAI's log probabilities have both lists.
_CHAT_LOGPROBS = '"logprobs":{"content":'
_BOTH_LISTS = '"logprobs":{"refusal":null,"content":'


def write_answer(response: Any) -> bytes:
    """A whole answer as JSON."""
    text = json.dumps(_drop_nulls(response.model_dump(mode="json")), ensure_ascii=False, separators=(",", ":"))
    return text.replace(_CHAT_LOGPROBS, _BOTH_LISTS).encode(errors="replace")


def write_chunk(event: str) -> str:
    """An event of a stream that vLLM has written."""
    return event.replace(_CHAT_LOGPROBS, _BOTH_LISTS)


def write_error(event: str) -> str:
    """An event with vLLM's error, whose code is a status; OpenAI's is a word."""
    values = json.loads(event.removeprefix("data: "))
    error = values["error"]
    values["error"] = {"message": error["message"], "type": error["type"], "param": error.get("param"), "code": None}
    return f"data: {json.dumps(values)}\n\n"


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _drop_nulls(v) for k, v in value.items() if v is not None or k in _NULLABLE}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value
