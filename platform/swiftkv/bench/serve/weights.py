"""Bytes of weights that a running engine holds, by role. Called by: bench/serve/run.py. Calls: engine/llm.py."""

import os
from pathlib import Path
from typing import Any

from swiftkv.engine.llm import run_engine
from swiftkv.engine.settings import EngineSettings


def weigh_running_engine(model: Path, settings: EngineSettings) -> int:
    """Bytes of all parameters and buffers in the engine's worker process."""
    before = os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # how vLLM sends a function to its own worker process
    try:
        with run_engine(model, settings) as llm:
            (num_bytes,) = llm.apply_model(_count_bytes)
    finally:
        os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION")
        if before is not None:
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = before
    return int(num_bytes)


def _count_bytes(module: Any) -> int:
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}  # tied weights once
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
