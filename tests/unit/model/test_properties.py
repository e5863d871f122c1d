"""Any small SwiftKV checkpoint of any family gives the reference's logits and tokens."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fakes import FAMILIES, TinyShape, random_prompt_ids, write_student
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import compute_logits, generate_greedy, load_weights

from swiftkv.families import FAMILIES as SERVED
from swiftkv.model.checkpoint import load_student


@st.composite
def draw_checkpoint(draw: st.DrawFn) -> dict:
    """Arguments of `write_student`: every setting that a config can have, in small sizes."""
    layers = draw(st.integers(2, 9))
    kept = draw(st.integers(1, layers))
    later = layers - kept
    group = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8) if later % size == 0]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    family = draw(st.sampled_from([family.teacher_model_type for family in SERVED.values()]))
    shape = TinyShape(
        hidden_size=draw(st.sampled_from([48, 96])),  # transformers' Llama wants a multiple of the heads
        intermediate_size=draw(st.sampled_from([16, 40])),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 32])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 500000.0])),
    )
    return {
        "shape": shape,
        "family": family,
        "num_key_value_layers": kept,
        "key_value_group_size": group,
        "tied": draw(st.booleans()),
        "keep_teacher_projections": draw(st.booleans()),
        "attention_bias": FAMILIES[family].has_bias_key and draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([None, 2, 5, 64])) if family == "mistral" else None,
        "new_rope_keys": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(draw_checkpoint(), st.integers(1, 40))
def test_logits_and_generated_tokens_equal_the_reference(checkpoint: dict, length: int) -> None:
    with TemporaryDirectory() as name:
        folder = write_student(Path(name), **checkpoint)
        config, weights = load_weights(folder)
        ids = random_prompt_ids(random.Random(length), length)
        model = load_student(folder)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, length),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
    torch.testing.assert_close(logits, compute_logits(config, weights, ids), atol=3e-4, rtol=0)
    assert output[0, length:].tolist() == generate_greedy(config, weights, ids, 6)
