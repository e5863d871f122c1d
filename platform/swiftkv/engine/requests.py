"""Refuses requests that an engine would answer wrongly, before the engine sees them: vLLM's `validate_params`.

vLLM validates a request's sampling parameters with the logits processors that its config names, in the process
that the user calls, for `LLM` and for the HTTP server (which answers 400) alike. The classes here only validate.
Called by: vLLM; named in its config by engine/plugin.py.
Source: vLLM 0.29, v1/sample/logits_processor/ and SamplingParams.verify.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class ValidatorsBeforeEngine(list[str]):
    """Names of validators that stay in the process of the user: vLLM's copy for the engine's process has none.

    The engine would call them at every step for nothing, and refuses any under speculative decoding.
    """

    def __reduce__(self) -> tuple[type[list[str]], tuple[()]]:
        return list, ()


class _Validator(LogitsProcessor):
    """A logits processor that leaves logits as they are."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass


class NoPromptLogprobs(_Validator):
    """For engines that skip: at prompt tokens there are no logits to take log probabilities of."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises: ValueError if the request asks for log probabilities of its prompt."""
        if sampling_params.prompt_logprobs is not None:
            raise ValueError(
                "prompt_logprobs cannot be given: prompt tokens skip the later layers of this SwiftKV model. "
                "Switch skipping off for the engine (additional_config swiftkv_skipping: false) to score prompts."
            )


class RemotePrefillOnly(_Validator):
    """For prefill halves: the one token that they answer means nothing, so all they do is fill KV for others."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises: ValueError unless the request is the prefill of one that another engine decodes."""
        NoPromptLogprobs.validate_params(sampling_params)
        transfer = (sampling_params.extra_args or {}).get("kv_transfer_params") or {}
        if not transfer.get("do_remote_decode") or sampling_params.max_tokens != 1:
            raise ValueError(
                "This engine holds the prefill half of a SwiftKV model and cannot answer requests: it takes "
                "max_tokens 1 with kv_transfer_params do_remote_decode true. Send the request to a decode engine."
            )
