"""What the halves of a SwiftKV model hand on: the boundary between them, and the hidden states at the end.

Computes no layer.
Called by: model/modeling.py and model/later_layer.py, which make and read them; distill/, evaluate/.
Calls: model/precision.py.

Shapes: B rows, T tokens, S selected positions, D hidden, N query heads, K KV heads, H head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from swiftkv.model.precision import find_product_dtype


@dataclass
class Boundary:
    """What the first half hands to the later half, the same for teacher and student."""

    hidden_BTD: Tensor
    """Residual stream entering layer `num_key_value_layers`."""
    position_embeddings: tuple[Tensor, Tensor]
    """Rotary cosines and sines of these positions, each [B or 1, T, H]."""
    causal_mask: Tensor | None
    """Mask in the form of the attention implementation in use; None means plain causal."""
    past_key_values: Cache | None = None
    folded_mask: Tensor | None = None
    """Of selected positions, added to scores; rows for every query head that shares a KV head: [B, 1, N/K * S, T]."""

    @classmethod
    def concatenate(cls, parts: Sequence["Boundary"]) -> "Boundary":
        """Rows that were run in several parts, which have no cache."""
        if len(parts) == 1:
            return parts[0]
        cos, sin = (
            torch.cat([part.position_embeddings[i].expand(len(part.hidden_BTD), -1, -1) for part in parts])
            for i in range(2)
        )
        masks = None
        if any(part.causal_mask is not None for part in parts):
            masks = torch.cat([part._expand_mask() for part in parts])
        return cls(torch.cat([part.hidden_BTD for part in parts]), (cos, sin), masks)

    def select(self, positions_BS: Tensor, heads_per_kv_head: int) -> "Boundary":
        """Some positions of each row, as queries that look back at all. Shapes: [B, S] -> S in place of T.

        For masks as sdpa and eager attention have them.
        """
        rows_B1 = torch.arange(len(positions_BS), device=positions_BS.device).unsqueeze(1)
        cos, sin = (part.expand(len(positions_BS), -1, -1)[rows_B1, positions_BS] for part in self.position_embeddings)
        # Once for all layers: what attention would make of a mask of booleans in each of them, and keep.
        seen_B1ST = self._select_mask(positions_BS).repeat(1, 1, heads_per_kv_head, 1)
        dtype = find_product_dtype(self.hidden_BTD)
        folded = torch.zeros(seen_B1ST.shape, dtype=dtype, device=positions_BS.device)
        folded.masked_fill_(~seen_B1ST, float("-inf"))
        return Boundary(self.hidden_BTD[rows_B1, positions_BS], (cos, sin), None, self.past_key_values, folded)

    def _select_mask(self, positions_BS: Tensor) -> Tensor:
        """What the positions see. Shapes: [B, S] -> [B, 1, S, T] bool."""
        if self.causal_mask is None:
            keys_T = torch.arange(self.hidden_BTD.shape[1], device=positions_BS.device)
            return (keys_T <= positions_BS.unsqueeze(-1)).unsqueeze(1)
        rows_B1 = torch.arange(len(positions_BS), device=positions_BS.device).unsqueeze(1)
        mask_B1ST = self._expand_mask()[:, 0][rows_B1, positions_BS].unsqueeze(1)
        return mask_B1ST if mask_B1ST.dtype == torch.bool else mask_B1ST >= 0

    def _expand_mask(self) -> Tensor:
        """The mask written out. Shapes: [B, 1, T, T]."""
        rows, num_tokens = self.hidden_BTD.shape[:2]
        mask = self.causal_mask
        if mask is None:
            mask = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=self.hidden_BTD.device).tril()
        return mask.expand(rows, -1, -1, -1)


@dataclass
class LaterStates:
    """Hidden states out of the later half."""

    last_BTD: Tensor
    """After the final norm: what the LM head reads."""
    penultimate_BTD: Tensor
    """Residual stream after the second-to-last layer, which the hidden loss compares."""

    @classmethod
    def concatenate(cls, parts: Sequence["LaterStates"]) -> "LaterStates":
        """Rows that were run in several parts."""
        return cls(torch.cat([part.last_BTD for part in parts]), torch.cat([part.penultimate_BTD for part in parts]))

    def select(self, positions_BS: Tensor) -> "LaterStates":
        """Some positions of each row. Shapes: [B, S] -> S in place of T."""
        return LaterStates(*(take_positions(states, positions_BS) for states in (self.last_BTD, self.penultimate_BTD)))


def take_positions(states_BTD: Tensor, positions_BS: Tensor) -> Tensor:
    """States of some positions of each row. Shapes: [B, T, D] and [B, S] -> [B, S, D]."""
    return states_BTD.take_along_dim(positions_BS.unsqueeze(-1), 1)


def choose_positions(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The positions where a mask is True, in order, and which of them count: shorter rows are filled up.

    Shapes: [B, T] bool -> [B, S] and [B, S] bool; S is 1 at least.
    """
    counts_B = mask_BT.sum(1)
    longest = max(int(counts_B.max()), 1)
    # Stable, so that a row's positions come first and in order; what fills up is a position without the mask.
    positions_BS = mask_BT.logical_not().byte().argsort(dim=1, stable=True)[:, :longest]
    return positions_BS, torch.arange(longest, device=mask_BT.device) < counts_B.unsqueeze(1)
