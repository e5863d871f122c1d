"""Starts and stops vLLM engines inside this process, for benchmarks and tests. Serving does not come through here.

Called by: bench/engine.py, scripts/smoke_engine.py, tests.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swiftkv.engine.compiler import EAGER_REASON
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import EngineError


@contextmanager
def run_engine(folder: Path, settings: EngineSettings) -> Iterator[Any]:
    """A vLLM `LLM` on the model in `folder`, stopped at the end. Takes token ids; loads no tokenizer.

    Raises: EngineError if vLLM does not start; the reason is in what vLLM printed before.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if settings.lacks_compiler():
        print(f"engine: {EAGER_REASON}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="swk-") as sockets:
        # vLLM leaves its sockets where they are, and prefers VLLM_CPU_KVCACHE_SPACE to the engine's argument.
        environment = {**settings.build_environment(), "VLLM_RPC_BASE_PATH": sockets, "VLLM_CPU_KVCACHE_SPACE": None}
        with _set_environment(environment):
            llm = _start(folder, settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def _start(folder: Path, settings: EngineSettings) -> Any:
    from vllm import LLM

    try:
        return LLM(
            str(folder),
            skip_tokenizer_init=True,
            disable_log_stats=False,
            use_tqdm_on_load=False,
            **settings.build_engine_arguments(),
        )
    except Exception as error:
        raise EngineError(f"{folder}: vLLM did not start: {error}") from error


@contextmanager
def _set_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """For the processes started meanwhile; None takes a variable away."""
    saved = {name: os.environ.get(name) for name in values}
    _put(values)
    try:
        yield
    finally:
        _put(saved)


def _put(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def generate_greedy(llm: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Any]:
    """vLLM's request outputs for prompts of token ids, `new_tokens` each, whatever the end token."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs: list[Any] = llm.generate(requests, parameters, use_tqdm=False)
    return outputs


def generate_tokens(llm: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The greedy tokens of each prompt."""
    return [list(output.outputs[0].token_ids) for output in generate_greedy(llm, prompts, new_tokens)]
