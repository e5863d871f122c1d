"""Starts and stops vLLM engines inside this process, for benchmarks, scores and tests; serving has its own.

Called by: bench/engine.py, evaluate/tasks.py, examples/quality, scripts/smoke_engine.py, tests.
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
from swiftkv.engine.side_channel import choose_side_channel
from swiftkv.errors import EngineError

KVTransfer = dict[str, Any]
"""vLLM's `kv_transfer_params` of one prompt: where its KV is, for the engine that is to decode it."""

PREFILL_ONLY: KVTransfer = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    **dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")),
}
"""Of a prompt that is prefilled for whichever engine asks for its KV."""


@contextmanager
def run_engine(folder: Path, settings: EngineSettings) -> Iterator[Any]:
    """A vLLM `LLM` on the model in `folder`, stopped at the end. Takes token ids; loads a tokenizer if there is one.

    Raises: EngineError if vLLM does not start; the reason is in what vLLM printed before.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if settings.lacks_compiler():
        print(f"engine: {EAGER_REASON}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="swk-") as sockets:
        # vLLM leaves its sockets where they are, and prefers VLLM_CPU_KVCACHE_SPACE to the engine's argument.
        own: dict[str, str | None] = {"VLLM_RPC_BASE_PATH": sockets, "VLLM_CPU_KVCACHE_SPACE": None}
        if settings.kv_transfer != "none":
            own |= choose_side_channel("127.0.0.1")
        with _set_environment({**settings.build_environment(), **own}):
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
            skip_tokenizer_init=not (folder / "tokenizer.json").is_file(),
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


def generate_greedy(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    transfers: Sequence[KVTransfer] | None = None,
    **sampling: Any,
) -> list[Any]:
    """vLLM's request outputs for prompts of token ids, `new_tokens` each, also past the end token (`ignore_eos`).

    With `transfers`, one per prompt from `prefill_remotely`, the prompts' KV is taken from where it was prefilled.
    `sampling`: more of vLLM's sampling parameters.
    """
    from vllm import SamplingParams

    shared = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False, **sampling}
    extras = [None] * len(prompts) if transfers is None else [{"kv_transfer_params": entry} for entry in transfers]
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    parameters = [SamplingParams(**shared, extra_args=extra) for _, extra in zip(prompts, extras, strict=True)]
    outputs: list[Any] = llm.generate(requests, parameters, use_tqdm=False)
    return outputs


def generate_tokens(
    llm: Any, prompts: Sequence[Sequence[int]], new_tokens: int, transfers: Sequence[KVTransfer] | None = None
) -> list[list[int]]:
    """The greedy tokens of each prompt, see `generate_greedy`."""
    return [list(output.outputs[0].token_ids) for output in generate_greedy(llm, prompts, new_tokens, transfers)]


def prefill_remotely(llm: Any, prompts: Sequence[Sequence[int]]) -> list[KVTransfer]:
    """Fill KV for prompts in an engine with kv_transfer "producer"; what to give `generate_greedy` of a consumer.

    The KV stays there until it was fetched, or for vLLM's lease (30 s) if nobody asks, so the prompts of one call
    must fit the producer's cache together.
    """
    outputs = generate_greedy(llm, prompts, 1, [PREFILL_ONLY] * len(prompts))
    return [output.kv_transfer_params for output in outputs]
