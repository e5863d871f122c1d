"""Requests that an engine would answer wrongly are refused; all others pass."""

import pickle
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from swiftkv.engine.requests import NoPromptLogprobs, RemotePrefillOnly, ValidatorsBeforeEngine

REMOTE: dict[str, Any] = {"kv_transfer_params": {"do_remote_decode": True}}


@pytest.mark.parametrize("validator", [NoPromptLogprobs, RemotePrefillOnly])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_log_probabilities_of_prompts_are_refused(validator: Any, number: int) -> None:
    parameters = SamplingParams(prompt_logprobs=number, max_tokens=1, extra_args=REMOTE)
    with pytest.raises(ValueError, match="prompt_logprobs cannot be given.*swiftkv_skipping: false"):
        validator.validate_params(parameters)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"logprobs": 5}, {"max_tokens": 1, "extra_args": REMOTE}, {"n": 2, "temperature": 1.0}],
    ids=str,
)
def test_other_requests_pass_an_engine_that_skips(arguments: dict[str, Any]) -> None:
    NoPromptLogprobs.validate_params(SamplingParams(**arguments))


def test_the_prefill_of_a_request_that_is_decoded_elsewhere_passes_a_prefill_half() -> None:
    RemotePrefillOnly.validate_params(SamplingParams(max_tokens=1, extra_args=REMOTE))


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 1},
        {"max_tokens": 1, "extra_args": {"kv_transfer_params": None}},
        {"max_tokens": 1, "extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}},
        {"max_tokens": 1, "extra_args": {"kv_transfer_params": {"do_remote_decode": False}}},
        {"max_tokens": 2, "extra_args": REMOTE},
        {"max_tokens": None, "extra_args": REMOTE},
    ],
    ids=str,
)
def test_whatever_wants_an_answer_is_refused_by_a_prefill_half(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prefill half.*Send the request to a decode engine"):
        RemotePrefillOnly.validate_params(SamplingParams(**arguments))


def test_validators_stay_in_the_process_that_names_them() -> None:
    names = ValidatorsBeforeEngine(["module:Name"])
    assert names == ["module:Name"]
    copied = pickle.loads(pickle.dumps(names))
    assert copied == [] and type(copied) is list


@pytest.mark.parametrize("validator", [NoPromptLogprobs, RemotePrefillOnly])
def test_a_validator_in_the_engine_leaves_logits_as_they_are(validator: Any) -> None:
    processor = validator(None, torch.device("cpu"), False)
    logits = torch.randn(3, 5)
    expected = logits.clone()
    processor.update_state(None)
    assert torch.equal(processor.apply(logits), expected) and processor.is_argmax_invariant()
