"""FLOPs of a request's tokens in one engine step, and those of the unmodified model for the same tokens.

Called by: engine/scheduler.py. Calls: spec.
"""

from dataclasses import dataclass
from typing import Literal

from swiftkv.spec import SwiftKVSpec

Work = Literal["executed", "unmodified"]


@dataclass(frozen=True)
class StepWork:
    """How one engine runs its model."""

    spec: SwiftKVSpec
    is_skipping: bool = True
    """Whether tokens that are not sampled from skip the later layers."""
    is_half: bool = False
    """Whether the later layers are not there at all (a prefill half)."""

    def count(self, start: int, end: int, num_sampled: int) -> dict[Work, float]:
        """FLOPs of the tokens from `start` to `end` of a sequence, of which the last `num_sampled` are sampled from."""
        others = end - start - num_sampled
        unmodified = others * self._count_whole(self.spec.teacher, start, end)
        unmodified += num_sampled * self._count_sampled(self.spec.teacher, end)
        if self.is_half:
            executed = (others + num_sampled) * self._count_skipping(start, end)
        else:
            other = self._count_skipping(start, end) if self.is_skipping else self._count_whole(self.spec, start, end)
            executed = others * other + num_sampled * self._count_sampled(self.spec, end)
        return {"executed": executed, "unmodified": unmodified}

    def _count_skipping(self, start: int, end: int) -> float:
        # Of a prompt twice as long as the chunk's middle the average token attends to as much.
        return self.spec.compute_prompt_token_flops(start + end).total

    def _count_whole(self, spec: SwiftKVSpec, start: int, end: int) -> float:
        return spec.compute_decoded_token_flops((start + end) // 2).total

    def _count_sampled(self, spec: SwiftKVSpec, end: int) -> float:
        return spec.compute_decoded_token_flops(end).total + spec.compute_lm_head_flops()
