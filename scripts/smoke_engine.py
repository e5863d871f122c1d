"""Starts one vLLM engine on a tiny random model and asks it for 4 tokens. CI runs it on a bare system.

Says nothing about right answers, only that everything an engine needs is there.
Called by: scripts/ci_chroot.sh. Calls: vLLM.
"""

import os
import sys
import tempfile
from pathlib import Path

from swiftkv.engine.compiler import EAGER_REASON, has_cxx_compiler

VOCAB_SIZE = 512
NUM_TOKENS = 4


def save_tiny_llama(folder: Path) -> None:
    """Two layers of random weights, with a head size that the CPU attention kernel takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def generate_tokens(folder: Path) -> list[int]:
    """The tokens that a new engine adds to a prompt of 16."""
    from vllm import LLM, SamplingParams

    eager = not has_cxx_compiler()
    print(f"smoke: {EAGER_REASON}" if eager else "smoke: the engine compiles its kernels", flush=True)
    engine = LLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=256, enforce_eager=eager)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": list(range(3, 19))}], sampling, use_tqdm=False)
    return list(outputs[0].outputs[0].token_ids)


def main() -> int:
    """Prints `smoke: ok` if the engine answered. Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="swiftkv-smoke-") as folder:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CACHE_ROOT=f"{folder}/cache",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        save_tiny_llama(Path(folder, "model"))
        tokens = generate_tokens(Path(folder, "model"))
    if len(tokens) != NUM_TOKENS or not all(0 <= token < VOCAB_SIZE for token in tokens):
        print(f"smoke: failed, the engine answered {tokens}", file=sys.stderr)
        return 1
    print("smoke: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
