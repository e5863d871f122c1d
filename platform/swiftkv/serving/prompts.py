"""What a request's prompt is before anybody has tokenised it, and what an answer says of it.

Called by: serving/decode.py, serving/prefill.py.
"""

import json
from types import SimpleNamespace
from typing import Any

BYTES_PER_TOKEN = 4.0
"""Of English text, until answers have told a model's own."""

_DATA = "data: "

_LEARNING = 0.1
"""What one answer counts for against all before it."""


def count_sequences(request: Any) -> int:
    """Sequences that the engine makes of the request: answers of each of its prompts."""
    prompt = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * (getattr(request, "n", None) or 1)


def leave_only_prompt(request: Any) -> Any:
    """The request, changed so that a prefill replica does nothing for the token that it throws away.

    `min_tokens` would even be refused there, beside the one token that is asked for.
    """
    request.min_tokens = 0
    request.logprobs = False if hasattr(request, "messages") else None
    for name in ("top_logprobs", "response_format", "structured_outputs"):
        if hasattr(request, name):
            setattr(request, name, None)
    return request


class TokenLengths:
    """How many bytes a token of this model's prompts has, as answers tell it."""

    def __init__(self) -> None:
        self.bytes_per_token = BYTES_PER_TOKEN

    def estimate(self, request: Any) -> float:
        """Prompt tokens: counted where the request has token ids, else from the text's length; 1 at least."""
        text, tokens = read_prompt(request)
        return tokens or max(1.0, len(text.encode()) / self.bytes_per_token)

    def learn(self, request: Any, answer: Any) -> int:
        """Prompt tokens that the engine counted; 0 if the answer does not say."""
        usage = getattr(answer, "usage", None)
        if usage is None or not usage.prompt_tokens:
            return 0
        text, tokens = read_prompt(request)
        if not tokens:
            self.bytes_per_token += _LEARNING * (len(text.encode()) / usage.prompt_tokens - self.bytes_per_token)
        return int(usage.prompt_tokens)


def count_cached(answer: Any) -> int:
    """Prompt tokens of the answer that its engine had in its cache."""
    details = getattr(getattr(answer, "usage", None), "prompt_tokens_details", None)
    return int(getattr(details, "cached_tokens", None) or 0)


def tell_cached(chunk: Any, cached_tokens: int) -> Any:
    """An item of an answer, its usage saying so many cached tokens.

    A decode engine counts KV that came from a prefill replica as cached; what that replica had to compute is not.
    """
    if isinstance(chunk, list):
        return [tell_cached(part, cached_tokens) for part in chunk]
    if isinstance(chunk, str):
        return "\n".join(_tell_cached(line, cached_tokens) for line in chunk.split("\n"))
    details = getattr(getattr(chunk, "usage", None), "prompt_tokens_details", None)
    if details is not None:
        details.cached_tokens = cached_tokens
    return chunk


def _tell_cached(line: str, cached_tokens: int) -> str:
    if '"cached_tokens"' not in line:  # in a text its quotes have backslashes
        return line
    event = json.loads(line.removeprefix(_DATA))
    event["usage"]["prompt_tokens_details"]["cached_tokens"] = cached_tokens
    return f"{_DATA}{json.dumps(event, separators=(',', ':'), ensure_ascii=False)}"


def read_prompt(request: Any) -> tuple[str, float]:
    """The prompt's text (token ids written out), and the number of its tokens where it has token ids, else 0."""
    messages = getattr(request, "messages", None)
    if messages is not None:
        return "\n".join(str(message.get("content") or "") for message in messages), 0.0
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt, 0.0
    if prompt and isinstance(prompt[0], int):
        return ",".join(map(str, prompt)), float(len(prompt))
    # Several prompts: each is a sequence of its own and all come back in one answer.
    parts = [read_prompt(SimpleNamespace(prompt=part)) for part in prompt or []]
    return "\n".join(text for text, _ in parts), sum(tokens for _, tokens in parts)
