"""What an OpenAI endpoint must answer, each as a check of a running one that serves a tiny random model named "tiny".

Prompts are long enough for a hop to a prefill pool. Bodies are checked against OpenAI's schema, whole and each chunk.
Called by: tests/integration/test_pools.py. Calls: openai, openai_schema.py, reference.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_schema import check_body
from reference import compute_log_probs, load_weights

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
IDS = list(TEXT.encode())
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": IDS, "max_tokens": 6, "temperature": 0}
MESSAGES = [{"role": "user", "content": TEXT}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
SAMPLED = {"temperature": 1, "seed": 5}
NAMES = {"completions": "CreateCompletionResponse", "chat/completions": "CreateChatCompletionResponse"}

ANSWER = {
    "type": "object",
    "properties": {"size": {"enum": [1, 2]}},
    "required": ["size"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": ANSWER}}
NO_SPACE = {"logit_bias": {str(byte): -100 for byte in b" \t\n\r"}}
"""A random model would go on with white space for ever where a grammar allows it."""
CALL_LOOK = NO_SPACE | {
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "max_tokens": 40,
}


def ask(client: openai.OpenAI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer, which fits the schema."""
    response = httpx.post(f"{client.base_url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    check_body(NAMES[path], answer)
    return answer


def stream(client: openai.OpenAI, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All chunks of an answer, each of which fits the schema."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{client.base_url}{path}", json=body | options, timeout=120)
    assert response.status_code == 200, response.text
    *events, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    name = NAMES[path] if path == "completions" else "CreateChatCompletionStreamResponse"
    for chunk in chunks:
        check_body(name, chunk)
    return chunks


def join(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def check_models(client: openai.OpenAI, folder: Path) -> None:
    models = httpx.get(f"{client.base_url}models").json()
    check_body("ListModelsResponse", models)
    assert [model["id"] for model in models["data"]] == ["tiny"]
    check_body("Model", httpx.get(f"{client.base_url}models/tiny").json())


def check_health(client: openai.OpenAI, folder: Path) -> None:
    root = str(client.base_url).removesuffix("/v1/")
    assert [httpx.get(f"{root}/{path}").status_code for path in ("health", "ready")] == [200, 200]


def check_tokenize(client: openai.OpenAI, folder: Path) -> None:
    answer = client.post("/tokenize", body={"model": "tiny", "prompt": TEXT}, cast_to=dict[str, Any])
    assert (answer["count"], answer["tokens"]) == (len(IDS), IDS)
    chat = client.post("/tokenize", body={"model": "tiny", "messages": MESSAGES}, cast_to=dict[str, Any])
    assert chat["count"] == len(IDS) + 3  # what the template adds: two roles and a line's end


def check_whole_and_streamed_say_the_same(client: openai.OpenAI, folder: Path) -> None:
    whole, chunks = ask(client, "completions", COMPLETION), stream(client, "completions", COMPLETION)
    assert join(chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"] == len(IDS) + 6
    whole, chunks = ask(client, "chat/completions", CHAT), stream(client, "chat/completions", CHAT)
    assert join(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def check_cached_tokens_are_told(client: openai.OpenAI, folder: Path) -> None:
    body = COMPLETION | {"prompt": [*IDS, *IDS, 7, 8, 9], "n": 1}
    for _ in range(3):  # more often than there are decode replicas
        usage = ask(client, "completions", body)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 128


def check_several_choices(client: openai.OpenAI, folder: Path) -> None:
    body = COMPLETION | SAMPLED | {"n": 3}
    choices = ask(client, "completions", body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["text"] for choice in choices}) == 3
    chunks = stream(client, "completions", body)
    assert [join(chunks, index) for index in range(3)] == [choice["text"] for choice in choices]
    chat = CHAT | SAMPLED | {"n": 2}
    contents = [choice["message"]["content"] for choice in ask(client, "chat/completions", chat)["choices"]]
    chunks = stream(client, "chat/completions", chat)
    assert [join(chunks, index) for index in range(2)] == contents
    both = ask(client, "completions", body | {"prompt": [IDS, IDS[:60]], "n": 2})
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]


def check_seed(client: openai.OpenAI, folder: Path) -> None:
    """The same seed, the same text, whichever replicas answer and whoever prefills: n of 2 is prefilled by decode."""
    texts = [ask(client, "completions", COMPLETION | SAMPLED)["choices"][0]["text"] for _ in range(3)]
    assert len(set(texts)) == 1
    assert ask(client, "completions", COMPLETION | SAMPLED | {"seed": 6})["choices"][0]["text"] != texts[0]


def check_stop(client: openai.OpenAI, folder: Path) -> None:
    text = ask(client, "completions", COMPLETION)["choices"][0]["text"]
    stop = text[3]
    expected = text[: text.index(stop)]
    choice = ask(client, "completions", COMPLETION | {"stop": [stop]})["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert join(stream(client, "completions", COMPLETION | {"stop": stop})) == expected


def check_logprobs(client: openai.OpenAI, folder: Path) -> None:
    """They are those of the model, also of the first token, whose prompt another replica has prefilled."""
    body = COMPLETION | {"logprobs": 2, "return_token_ids": True}
    choice = ask(client, "completions", body)["choices"][0]
    expected = compute_log_probs(*load_weights(folder), IDS, choice["token_ids"])
    given = choice["logprobs"]["token_logprobs"]
    assert given == pytest.approx([float(row.max()) for row in expected], abs=2e-3)
    # By text, which two bytes that are no character share; the token itself is there in any case.
    assert all(1 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])
    streamed = [
        value
        for chunk in stream(client, "completions", body)
        for piece in chunk["choices"]
        for value in piece["logprobs"]["token_logprobs"]
    ]
    assert streamed == pytest.approx(given, abs=2e-3)


def check_chat_logprobs(client: openai.OpenAI, folder: Path) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 3}
    entries = ask(client, "chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [3] * 6
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    streamed = [
        entry
        for chunk in stream(client, "chat/completions", body)
        for piece in chunk["choices"]
        if piece.get("logprobs")
        for entry in piece["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def check_json_schema(client: openai.OpenAI, folder: Path) -> None:
    body = CHAT | NO_SPACE | {"response_format": FORMAT, "max_tokens": 60}
    content = ask(client, "chat/completions", body)["choices"][0]["message"]["content"]
    assert json.loads(content)["size"] in (1, 2)
    assert join(stream(client, "chat/completions", body)) == content


def check_tools(client: openai.OpenAI, folder: Path) -> None:
    choice = ask(client, "chat/completions", CHAT | CALL_LOOK)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"])["size"] in (1, 2)
    chunks = stream(client, "chat/completions", CHAT | CALL_LOOK)
    assert "".join(_list_arguments(chunks)) == call["function"]["arguments"]
    required = ask(client, "chat/completions", CHAT | CALL_LOOK | {"tool_choice": "required", "max_tokens": 90})
    (call,) = required["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["size"] in (1, 2)
    # A random model writes no call, and what it writes is not taken for one.
    choice = ask(client, "chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "auto"})["choices"][0]
    assert choice["message"]["content"] and not choice["message"].get("tool_calls")


def _list_arguments(chunks: list[dict[str, Any]]) -> Iterator[str]:
    for chunk in chunks:
        for choice in chunk["choices"]:
            for piece in choice["delta"].get("tool_calls") or ():
                yield piece["function"].get("arguments") or ""


def check_echo(client: openai.OpenAI, folder: Path) -> None:
    answer = ask(client, "completions", COMPLETION | {"echo": True})["choices"][0]["text"]
    assert answer == TEXT + ask(client, "completions", COMPLETION)["choices"][0]["text"]


REFUSED: list[tuple[str, dict[str, Any], int]] = [
    ("completions", COMPLETION | {"prompt_logprobs": 1}, 400),
    ("completions", COMPLETION | {"echo": True, "logprobs": 1}, 400),
    ("chat/completions", CHAT | {"prompt_logprobs": 1}, 400),
    ("completions", COMPLETION | {"logprobs": 1000}, 400),
    ("completions", COMPLETION | {"prompt": "x" * 4000}, 400),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x" * 4000}]}, 400),
    ("completions", COMPLETION | {"model": "absent"}, 404),
    ("completions", COMPLETION | {"temperature": "warm"}, 400),
    ("completions", COMPLETION | {"best_of": 3}, 400),
    ("chat/completions", CHAT | {"functions": [TOOL["function"]]}, 400),
    ("chat/completions", CHAT | {"response_format": {"type": "json_schema"}}, 400),
    ("chat/completions", CHAT | CALL_LOOK | {"tools": []}, 400),
]


def check_refusals(client: openai.OpenAI, folder: Path) -> None:
    for path, body, status in REFUSED:
        for options in ({}, {"stream": True}):
            response = httpx.post(f"{client.base_url}{path}", json=body | options, timeout=120)
            assert response.status_code == status, (body, response.text)
            check_body("ErrorResponse", response.json())


CHECKS = [
    check_models,
    check_health,
    check_tokenize,
    check_whole_and_streamed_say_the_same,
    check_cached_tokens_are_told,
    check_several_choices,
    check_seed,
    check_stop,
    check_logprobs,
    check_chat_logprobs,
    check_json_schema,
    check_tools,
    check_echo,
    check_refusals,
]
