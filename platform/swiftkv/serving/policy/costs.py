"""What work costs on one replica, in seconds: a prompt on a prefill replica, a step on a decode replica.

A prior from the model's spec and the hardware's achieved rates; `calibration` corrects it by what replicas measure.
Measures nothing itself.
Called by: the other files of serving/policy, and whoever writes a pool's settings. Calls: spec.py.
"""

from pydantic import Field

from swiftkv.config import StrictModel
from swiftkv.spec import SwiftKVSpec


class Hardware(StrictModel):
    """What one replica (all of its devices) achieves; data sheets promise more."""

    flops_per_s: float = Field(gt=0)
    """Achieved FLOPs per second in large matrix products."""

    memory_bytes_per_s: float = Field(gt=0)
    """Achieved bytes per second from the memory that holds weights and KV."""

    kv_bytes: float = Field(gt=0)
    """Bytes of KV cache of one replica."""

    link_bytes_per_s: float = Field(default=10e9, gt=0)
    """Bytes per second at which KV moves from a prefill replica to a decode replica."""


class Costs(StrictModel):
    """Seconds of one replica. Where a batch is computed, requests share it in the order they came."""

    prefill_s_per_token: float = Field(gt=0)
    """Seconds per prompt token without attention to earlier ones."""

    prefill_s_per_token_squared: float = Field(default=0, ge=0)
    """Seconds per prompt token and prompt token: a prompt of L tokens costs this times L² for its attention."""

    prefill_s_per_request: float = Field(default=0, ge=0)
    """Seconds per prompt, whatever its length."""

    transfer_s_per_token: float = Field(default=0, ge=0)
    """Seconds per prompt token until its KV lies in a decode replica, after it was computed."""

    first_token_s: float = Field(default=0.02, ge=0)
    """Seconds of a TTFT that no replica's work explains: gateway, routing, handshakes."""

    step_s: float = Field(gt=0)
    """Seconds of a decode step whatever its batch: reading the weights, launching kernels."""

    step_s_per_sequence: float = Field(default=0, ge=0)
    """Seconds of a decode step per sequence in it."""

    step_s_per_context_token: float = Field(default=0, ge=0)
    """Seconds of a decode step per token of context that its sequences attend to."""

    kv_tokens: float = Field(gt=0)
    """Tokens of KV that fit into one decode replica."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences that one decode replica runs at once."""

    def prefill_s(self, prompt_tokens: float) -> float:
        """Seconds that a prefill replica computes for a prompt of so many uncached tokens."""
        if prompt_tokens <= 0:
            return 0.0
        per_token = self.prefill_s_per_token + self.prefill_s_per_token_squared * prompt_tokens
        return self.prefill_s_per_request + per_token * prompt_tokens

    def decode_step_s(self, sequences: float, context_tokens: float) -> float:
        """Seconds of a decode step; `context_tokens` is the mean of its sequences."""
        return self.step_s + sequences * self.seconds_per_sequence(context_tokens)

    def seconds_per_sequence(self, context_tokens: float) -> float:
        """Seconds by which one more sequence with so much context makes a step longer."""
        return self.step_s_per_sequence + self.step_s_per_context_token * context_tokens

    def alone_ttft_s(self, prompt_tokens: float) -> float:
        """The TTFT of a prompt for which everything is idle: no number of replicas gives a shorter one."""
        transfer = self.transfer_s_per_token * prompt_tokens
        return self.prefill_s(prompt_tokens) + transfer + self.first_token_s + self.decode_step_s(1, prompt_tokens)

    def scaled(self, prefill: float, decode: float) -> "Costs":
        """The same costs where prefill takes `prefill` times and decode `decode` times as long."""
        return self.model_copy(
            update={
                "prefill_s_per_token": self.prefill_s_per_token * prefill,
                "prefill_s_per_token_squared": self.prefill_s_per_token_squared * prefill,
                "prefill_s_per_request": self.prefill_s_per_request * prefill,
                "step_s": self.step_s * decode,
                "step_s_per_sequence": self.step_s_per_sequence * decode,
                "step_s_per_context_token": self.step_s_per_context_token * decode,
            }
        )


def build_costs(
    spec: SwiftKVSpec,
    prefill: Hardware,
    decode: Hardware,
    *,
    bytes_per_parameter: float = 2,
    bytes_per_kv_value: float = 2,
    max_num_seqs: int = 256,
) -> Costs:
    """The prior: FLOPs over achieved FLOP/s for prefill, the slower of memory and FLOPs term by term for decode.

    A prompt token costs the first layers and the KV projections of the later ones only, on either half. A decoded token
    runs every layer; its step reads all weights once and each sequence's KV.
    """
    linear = spec.compute_prompt_token_flops(0).total
    attention = spec.compute_prompt_token_flops(1).total - linear  # of a token in a prompt of one token: grows with it
    decoded = spec.compute_decoded_token_flops(0).total
    decode_attention = spec.compute_decoded_token_flops(1).total - decoded
    kv_bytes = spec.compute_kv_bytes_per_token(bytes_per_kv_value)
    # Readers of one group read its cache once each, so a step reads every layer's view of it.
    kv_bytes_read = kv_bytes * spec.shape.num_hidden_layers / spec.num_kv_caches
    return Costs(
        prefill_s_per_token=linear / prefill.flops_per_s,
        prefill_s_per_token_squared=attention / prefill.flops_per_s,
        transfer_s_per_token=kv_bytes / min(prefill.link_bytes_per_s, decode.link_bytes_per_s),
        step_s=spec.compute_weight_bytes(bytes_per_parameter) / decode.memory_bytes_per_s,
        step_s_per_sequence=(decoded + spec.compute_lm_head_flops()) / decode.flops_per_s,
        step_s_per_context_token=max(kv_bytes_read / decode.memory_bytes_per_s, decode_attention / decode.flops_per_s),
        kv_tokens=decode.kv_bytes / kv_bytes,
        max_num_seqs=max_num_seqs,
    )
