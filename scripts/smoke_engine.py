"""Starts one engine on a tiny random SwiftKV model and asks it for 4 tokens, and for 4 drawn at random.

CI runs it on a bare system. Compares with the Hugging Face model's tokens, so that an engine that starts but skips
wrongly is found too; what is drawn at random goes ways of vLLM's own that want a compiler.
Called by: scripts/ci_chroot.sh. Calls: bench/models.py (the model), engine/llm.py.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NUM_TOKENS = 4


def main() -> int:
    """Prints `smoke: ok` if the engine answered rightly. Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="swiftkv-smoke-") as folder:
        os.environ.update(VLLM_CACHE_ROOT=f"{folder}/cache", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        tokens, expected = generate_both(Path(folder))
    if tokens != expected:
        print(f"smoke: failed, the engine answered {tokens} instead of {expected}", file=sys.stderr)
        return 1
    print("smoke: ok")
    return 0


def generate_both(folder: Path) -> tuple[list[int], list[int]]:
    """The tokens that a new engine, and the Hugging Face model, add to a prompt of 40."""
    import torch

    from swiftkv.bench.models import build_random_prompts, write_random_models
    from swiftkv.engine.llm import generate_tokens, run_engine
    from swiftkv.engine.settings import EngineSettings
    from swiftkv.model.checkpoint import load_student
    from swiftkv.spec import ModelShape

    shape = ModelShape(64, 128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                       vocab_size=512)  # fmt: skip
    write_random_models(folder, shape, max_tokens=256)
    prompts = build_random_prompts([40], shape.vocab_size)
    with torch.no_grad():
        ids = load_student(folder / "student").generate(
            torch.tensor(prompts), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    with run_engine(folder / "student", EngineSettings(dtype="float32", max_model_len=256, kv_cache_gib=0.1)) as llm:
        greedy = generate_tokens(llm, prompts, NUM_TOKENS)[0]
        drawn = draw_tokens(llm, prompts[0])
        assert len(drawn) == NUM_TOKENS, drawn
        return greedy, ids[0, 40:].tolist()


def draw_tokens(llm: Any, prompt: list[int]) -> list[int]:
    """Tokens drawn at random, with log probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, logprobs=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


if __name__ == "__main__":
    sys.exit(main())
