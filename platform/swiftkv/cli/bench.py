"""`swiftkv bench engine`: the published comparisons, each measured again by one command.

Called by: cli/main.py. Calls: bench/engine.py.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from swiftkv.errors import EngineError

bench_app = typer.Typer(help="Measure what the README claims, on this machine.", no_args_is_help=True)

_CHECK_LENGTHS = (1, 7, 64, 250, 600)
_CHECK_NEW_TOKENS = 8


@bench_app.callback()
def _bench() -> None:
    """Measure what the README claims, on this machine."""


@bench_app.command()
def engine(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts.", min=16)] = 2000,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt, for TPOT.", min=2)] = 17,
    pairs: Annotated[int, typer.Option(help="Pairs of teacher and student passes.", min=1)] = 5,
) -> None:
    """Prompt tokens/s of a SwiftKV model over its teacher's in vLLM, random weights, about 400 M parameters."""
    from swiftkv.bench import engine as bench
    from swiftkv.engine.settings import EngineSettings

    _stage("writing random models")
    with tempfile.TemporaryDirectory(prefix="swiftkv-bench-") as temporary:
        folder = Path(temporary)
        context = prompt_tokens + new_tokens
        spec = bench.write_random_models(folder, bench.BENCH_SHAPE, max(context, 1024))
        vocab_size = spec.shape.vocab_size
        settings = EngineSettings(
            dtype="bfloat16",
            max_model_len=context,
            max_num_batched_tokens=context,
            max_num_seqs=8,
            enable_prefix_caching=False,
            kv_cache_gib=0.5,
        )
        prompts = bench.build_random_prompts([prompt_tokens], vocab_size)
        result = bench.measure_pairs(
            folder / "teacher", folder / "student", prompts, new_tokens, pairs, settings, _stage
        )
        _stage("the student with and without skipping, float32, eager")
        check = settings.model_copy(update={"dtype": "float32", "enforce_eager": True, "max_model_len": 1024})
        same = bench.check_skipping(
            folder / "student", bench.build_random_prompts(_CHECK_LENGTHS, vocab_size), _CHECK_NEW_TOKENS, check
        )
    figures = bench.summarise(result, spec, prompt_tokens, settings) | {
        "same_tokens_with_and_without_skipping": same,
        "command": f"swiftkv bench engine --prompt-tokens {prompt_tokens} --new-tokens {new_tokens} --pairs {pairs}",
    }
    text = json.dumps(figures, indent=2)
    typer.echo(text)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text + "\n", encoding="utf-8")
    if not same:
        raise EngineError("the student's tokens with and without skipping differ; its speed means nothing.")


def _stage(text: str) -> None:
    typer.echo(f"bench: {text}", err=True)
