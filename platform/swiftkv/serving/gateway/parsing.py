"""Turns a body into one checked request: JSON, the model's name, vLLM's own validation, fields nobody may set.

Everything that goes wrong here is the client's, and becomes a 400. Checked once: the engine's server gets the
object. Knows no tenant.
Called by: gateway/generation.py. Calls: vLLM's request classes, as Ray Serve LLM extends them.
"""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from ray.llm._internal.serve.core.configs.openai_api_models import (  # Ray's own examples take these from here
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request

from swiftkv.serving.gateway.refusals import refuse
from swiftkv.serving.gateway.settings import Limits

BYTES_PER_TOKEN = 4

ENGINE_FIELDS = frozenset(
    {
        "kv_transfer_params",
        "ec_transfer_params",
        "priority",
        "request_id",
        "data_parallel_rank",
        "vllm_xargs",
        "prompt_embeds",
        "chat_template",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "logits_processors",
        "routed_experts_prompt_start",
    }
)
"""vLLM's fields that reach into the engine: its transfers, its schedule, tensors and templates that it would run."""

IGNORED_FIELDS = frozenset({"best_of", "functions", "function_call", "audio", "web_search_options"})
"""OpenAI's, of which vLLM takes no notice: the answer would not be the one that was asked for. (best_of 1 is.)"""

_INT64 = 2**63
_LONG_NUMBER = re.compile(rb"\d{19}")


@dataclass(frozen=True)
class Kind:
    """One route that takes a body."""

    method: str
    """Of the LLM server."""
    request: TypeAdapter[Any]
    generates: bool


CHAT = Kind("chat", TypeAdapter(ChatCompletionRequest), generates=True)
COMPLETIONS = Kind("completions", TypeAdapter(CompletionRequest), generates=True)
TOKENIZE = Kind("tokenize", TypeAdapter(TokenizeCompletionRequest), generates=False)
TOKENIZE_CHAT = Kind("tokenize", TypeAdapter(TokenizeChatRequest), generates=False)


@dataclass(frozen=True)
class Size:
    """What a request asks for."""

    prompt_tokens: int
    output_tokens: int
    sequences: int


def parse_json(body: bytes) -> dict[str, Any]:
    """The body's object.

    Raises: Refusal 400 if it is no JSON object, or has numbers that no engine can hold.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise refuse(400, f"the body is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise refuse(400, "the body is not a JSON object.")
    if _LONG_NUMBER.search(body) and _has_long_integer(values):
        raise refuse(400, "an integer in the body does not fit into 64 bits.")
    return values


def parse_request(kind: Kind, values: dict[str, Any]) -> Any:
    """The request as vLLM checks it. `values` may be changed.

    Raises: Refusal 400 naming the field.
    """
    for name in ENGINE_FIELDS & values.keys():
        if values[name] is not None:
            raise refuse(400, f"{name} cannot be set here; remove it.", "unsupported_parameter", name)
        del values[name]
    for name in IGNORED_FIELDS & values.keys():
        if values[name] not in (None, 1):
            raise refuse(400, f"{name} is not supported here; remove it.", "unsupported_parameter", name)
    try:
        request = kind.request.validate_python(values)
        return _sanitize_chat_completion_request(request) if "messages" in values else request
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise refuse(400, f"{place or 'body'}: {first['msg']}", param=place or None) from None
    except Exception as error:  # vLLM's checks run on raw values and raise whatever those lead to
        param = getattr(error, "parameter", None)
        raise refuse(400, f"the request cannot be read: {error}", param=param) from None


def measure(kind: Kind, request: Any, num_body_bytes: int, limits: Limits) -> Size:
    """What the request asks for.

    Raises: Refusal 400 if that is more than any request may.
    """
    if not kind.generates:
        return Size(0, 0, 0)
    if kind is COMPLETIONS:
        num_prompts, prompt_tokens = _measure_prompt(request.prompt)
        max_tokens = request.max_tokens
    else:
        num_prompts, prompt_tokens = 1, num_body_bytes // BYTES_PER_TOKEN
        max_tokens = request.max_completion_tokens or request.max_tokens or limits.assumed_output_tokens
    sequences = num_prompts * max(1, request.n or 1)
    if sequences > limits.max_sequences:
        message = f"{sequences} answers were asked for (n times prompts); at most {limits.max_sequences} are given."
        raise refuse(400, message, param="n")
    if prompt_tokens > limits.max_prompt_tokens:
        message = f"the prompt has about {prompt_tokens} tokens; at most {limits.max_prompt_tokens} are taken."
        raise refuse(400, message, "context_length_exceeded")
    # No context is longer than the longest prompt: what is asked for beyond would only upset the accounts.
    output_tokens = min(max(0, max_tokens), limits.max_prompt_tokens)
    return Size(max(1, prompt_tokens), output_tokens * sequences, sequences)


def _measure_prompt(prompt: Any) -> tuple[int, int]:
    """Number of prompts, and their tokens together."""
    if not prompt:
        return 1, 0
    if isinstance(prompt, str):
        return 1, len(prompt.encode()) // BYTES_PER_TOKEN
    if isinstance(prompt[0], int):
        return 1, len(prompt)
    return len(prompt), sum(_measure_prompt(one)[1] for one in prompt)


def _has_long_integer(value: Any) -> bool:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, int) and not -_INT64 <= value < _INT64:
            return True
    return False
