"""The one table of what differs between model families. Holds no layers: `model/` and `engine/` read it.

A family is added by adding a row here and a test. A family that is not in the table is refused by name.
Called by: model/, engine/, cli (for publish).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swiftkv.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """What one family of teachers is called, and how its attention differs from plain Llama."""

    teacher_model_type: str
    """`model_type` of the teacher's config.json."""
    model_type: str
    """`model_type` of the SwiftKV checkpoint."""
    architecture: str
    """Class name in the SwiftKV checkpoint's `architectures`."""

    def has_qkv_bias(self, config: Any) -> bool:
        """Whether Q, K and V projections carry biases, given the family's Hugging Face config."""
        return bool(getattr(config, "attention_bias", False))


_ROWS = (Family("llama", "llama_swiftkv", "LlamaSwiftKVForCausalLM"),)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ROWS}
"""SwiftKV `model_type` -> family."""

_BY_TEACHER: Mapping[str, Family] = {family.teacher_model_type: family for family in _ROWS}


def find_teacher_family(model_type: str | None) -> Family:
    """The family whose teacher has this `model_type`.

    Raises: CheckpointError naming the families there are.
    """
    family = _BY_TEACHER.get(model_type or "")
    if family is None:
        raise CheckpointError(
            f"Teacher has model_type {model_type!r}; families with a SwiftKV form are: "
            f"{', '.join(_BY_TEACHER)}. Choose a teacher of one of these."
        )
    return family
