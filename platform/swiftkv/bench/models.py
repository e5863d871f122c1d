"""Random models and prompts for benches: speed does not depend on what weights say.

Called by: bench/engine.py, bench/distill.py, bench/scaling.py, scripts/smoke_engine.py. Calls: model/convert.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkv.spec import ModelShape, SwiftKVSpec

if TYPE_CHECKING:
    from swiftkv.model.modeling import SwiftKVForCausalLM

Prompts = Sequence[Sequence[int]]

LAPTOP_SHAPE = ModelShape(
    hidden_size=1536,
    intermediate_size=5376,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=3,
    head_dim=128,
    vocab_size=8192,
    tie_word_embeddings=True,
)
"""Layers of Llama-3.1-8B at three eighths of their width, about 380 million parameters: linear layers dominate, and
two CPU cores can run it."""

LLAMA_8B_SHAPE = ModelShape(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
)
"""Llama-3.1-8B."""

NARROW_8B_SHAPE = ModelShape(
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=32,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=16032,
)
"""Llama-3.1-8B with an eighth of its width and vocabulary: the same proportions of weights."""

TRAINING_SHAPE = replace(NARROW_8B_SHAPE, num_hidden_layers=16, vocab_size=4096)
"""For a training step on two CPU cores; with so few tokens to choose from, a tile of the loss holds a whole row."""

EIGHT_LAYER_SHAPE = ModelShape(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
)
"""For counting what fits a KV cache, which depends on layers and heads only."""


def write_random_models(
    folder: Path, shape: ModelShape, max_tokens: int, group_sizes: Sequence[int] = (1,), seed: int = 0
) -> SwiftKVSpec:
    """A random Llama as `teacher` in `folder`, and a student with half the layers skipped for each group size.

    The students are `student` (group size 1) and `student-<group size>`, all in bfloat16. Returns the spec of the
    first of them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from swiftkv.model.checkpoint import save_student
    from swiftkv.model.convert import convert_teacher

    torch.manual_seed(seed)
    config = LlamaConfig(**build_config_values(shape), max_position_embeddings=max_tokens, dtype=torch.bfloat16)
    with torch.device("cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "teacher")
    kept = shape.num_hidden_layers // 2
    for group_size in group_sizes:
        student = convert_teacher(folder / "teacher", kept, group_size, dtype=torch.bfloat16)
        save_student(student, folder / ("student" if group_size == 1 else f"student-{group_size}"))
    return SwiftKVSpec(shape, kept, group_sizes[0])


def build_random_student(shape: ModelShape, device: str = "cpu") -> "SwiftKVForCausalLM":
    """A random Llama with half of its layers skipped, ready to be distilled; on "meta" it has shapes only."""
    import torch

    from swiftkv.hf_config import CONFIG_CLASSES
    from swiftkv.model.convert import freeze_teacher, initialise_student
    from swiftkv.model.modeling import MODEL_CLASSES

    config = CONFIG_CLASSES["llama_swiftkv"](
        **build_config_values(shape),
        num_key_value_layers=shape.num_hidden_layers // 2,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = MODEL_CLASSES["llama_swiftkv"](config)
    if device != "meta":
        initialise_student(model)
    freeze_teacher(model)
    return model


def build_config_values(shape: ModelShape) -> dict[str, Any]:
    """The shape in the words of a Hugging Face config of a dense family."""
    return {name: value for name, value in asdict(shape).items() if "experts" not in name}


def build_random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """One prompt of random tokens per length."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, length).tolist() for length in lengths]
