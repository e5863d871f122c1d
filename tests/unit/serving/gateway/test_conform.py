"""vLLM's answers as the gateway passes them on, against OpenAI's schema or, where that is not at hand, our own."""

import json

import pytest
from openai_schema import check_body
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse, CompletionResponse

from swiftkv.serving.gateway.conform import write_answer, write_chunk, write_error

USAGE = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
TOKEN = {"token": "a", "logprob": -0.5, "bytes": [97]}


def build_chat(message, logprobs=None):
    choice = {"index": 0, "message": {"role": "assistant", **message}, "logprobs": logprobs, "finish_reason": "stop"}
    return ChatCompletionResponse(model="tiny", choices=[choice], usage=USAGE)


def build_completion(logprobs=None):
    choice = {"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "stop"}
    return CompletionResponse(model="tiny", choices=[choice], usage=USAGE)


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ANSWERS = {
    "chat": ("CreateChatCompletionResponse", build_chat({"content": "a"})),
    "chat with logprobs": (
        "CreateChatCompletionResponse",
        build_chat({"content": "a"}, {"content": [{**TOKEN, "top_logprobs": [TOKEN]}]}),
    ),
    "chat with a call": ("CreateChatCompletionResponse", build_chat({"content": None, "tool_calls": [CALL]})),
    "completion": ("CreateCompletionResponse", build_completion()),
    "completion with logprobs": (
        "CreateCompletionResponse",
        build_completion(
            {"text_offset": [0], "token_logprobs": [-0.5], "tokens": ["a"], "top_logprobs": [{"a": -0.5}]}
        ),
    ),
}


@pytest.mark.parametrize(("schema", "response"), ANSWERS.values(), ids=ANSWERS)
def test_whole_answers_fit_the_schema_and_keep_what_they_say(schema, response):
    written = json.loads(write_answer(response))
    check_body(schema, written)
    for choice in written["choices"]:
        (choice["logprobs"] or {}).pop("refusal", None)  # vLLM's has none
    assert type(response).model_validate(written).model_dump() == response.model_dump()


def test_what_the_schema_wants_and_the_answer_lacks_is_found():
    written = json.loads(write_answer(build_chat({"content": "a"})))
    del written["choices"][0]["message"]["refusal"]
    with pytest.raises(AssertionError, match=r"choices\[0\].*refusal"):
        check_body("CreateChatCompletionResponse", written)


def test_log_probabilities_of_a_chunk_have_both_lists_and_text_that_looks_like_them_stays():
    text = '"logprobs":{"content":1}'
    choice = {
        "index": 0,
        "delta": {"content": text},
        "logprobs": {"content": [{**TOKEN, "top_logprobs": []}]},
        "finish_reason": None,
    }
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
    event = f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    written = json.loads(write_chunk(event).removeprefix("data: "))
    check_body("CreateChatCompletionStreamResponse", written)
    assert written["choices"][0]["delta"]["content"] == text
    assert written["choices"][0]["logprobs"].pop("refusal") is None
    assert written == chunk


def test_an_engine_s_error_within_a_stream_has_a_word_for_a_code_or_none():
    error = {"message": "gone", "type": "InternalServerError", "param": None, "code": 500}
    written = write_error(f"data: {json.dumps({'error': error})}\n\n")
    check_body("ErrorResponse", json.loads(written.removeprefix("data: ")))
    assert "gone" in written and written.endswith("\n\n")
