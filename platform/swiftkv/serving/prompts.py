"""What a request's prompt is before anybody has tokenised it.

Called by: serving/decode.py, serving/prefill.py.
"""

from types import SimpleNamespace
from typing import Any

BYTES_PER_TOKEN = 4.0
"""Of English text, until answers have told a model's own."""


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


def estimate_tokens(request: Any, bytes_per_token: float = BYTES_PER_TOKEN) -> float:
    """Prompt tokens: counted where the request has token ids, else from the text's length; 1 at least."""
    text, tokens = read_prompt(request)
    return tokens or max(1.0, len(text.encode()) / bytes_per_token)


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
