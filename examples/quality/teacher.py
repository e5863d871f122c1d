"""Trains the teacher of the quality table from scratch: a small Llama, in about half an hour on two idle CPU cores
with bfloat16 instructions (at 1.2 s a step).

Not a recipe for good models, and no part of the product: `swiftkv` sees an ordinary Hugging Face folder. The same
seed, number of steps and number of threads give the same weights on one kind of processor, interrupted or not.
Called by: run.py, or by hand: `python teacher.py --corpus DIR --output DIR`; `--resume` goes on after a kill.
Calls: rows.py, muon.py, model/precision.py, transformers; reads what corpus.py wrote. Leaves in the output folder:
teacher/, teacher-latest/ (a try-out, now and then), state.pt (to go on from), teacher.log and summary.json.

Shapes: B rows, T tokens, D hidden.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

# Read once, when torch loads OpenMP: threads that spin at each barrier are slow where something else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from muon import Muon
from rows import Row, build_trees, compute_mask, iterate_rows, load_pairs
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swiftkv.errors import ConfigError, DataError, SwiftKVError
from swiftkv.model.precision import has_bfloat16_instructions

NUM_STEPS = 1500
CONTEXT_TOKENS = 1024
ROW_TOKENS = {
    "wikisql": (256,),
    "spider": (512, CONTEXT_TOKENS),
    "squality": (CONTEXT_TOKENS,),
    "qmsum": (CONTEXT_TOKENS,),
    "thealgorithms": (CONTEXT_TOKENS,),
}
"""Lengths of the rows of each corpus; a tree goes into rows of the first that it fits in, or into none."""
SHORT_ROWS = (("wikisql", 256, 9), ("spider", 512, 2))
"""Corpus, tokens and number of the rows of every step; beside them comes one row of CONTEXT_TOKENS."""
LONG_ROWS = ("spider", "qmsum", "thealgorithms", "spider", "squality", "thealgorithms")
"""The long rows of successive steps."""

MATRIX_RATE = 0.02
EMBEDDING_RATE = 4e-3
"""Also that of the norms."""
WEIGHT_DECAY = 0.05
"""Of the matrices."""
WARMUP_STEPS = 30
DECAY_FRAC = 0.7
"""Share of the training, the last one, over which the rates fall to 0 in a line."""
MAX_GRADIENT_NORM = 1.0

LOG_S = 20.0
STATE_S = 240.0
SNAPSHOT_S = 480.0
STATE_FILE = "state.pt"


@dataclass
class Progress:
    """How far a training is; losses are running means over answer tokens, in nats."""

    num_steps: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    wikisql_loss: float = math.nan
    spider_loss: float = math.nan


@dataclass(frozen=True)
class TeacherSummary:
    """What training took."""

    num_parameters: int
    num_steps: int
    num_tokens: int
    """Positions of rows, among them the few that fill up."""
    training_s: float
    seed: int


def train_teacher(
    corpus: Path,
    output: Path,
    steps: int = NUM_STEPS,
    seed: int = 0,
    resume: bool = False,
    config_changes: dict[str, Any] | None = None,
) -> TeacherSummary:
    """A Llama with its tokenizer in `output`/teacher, trained for `steps` optimizer steps; returns what it took.

    `resume` goes on from the state in `output`, if there is one. `config_changes` overrides keys of the model's config.
    Raises: ConfigError if `steps` is not above 0, or the state is of another length or seed; DataError if `corpus` was
    not written by corpus.py.
    """
    if steps <= 0:
        raise ConfigError(f"steps: {steps} given, a number above 0 is allowed. Give more, or leave it out.")
    tokenizer = load_tokenizer(corpus)
    torch.manual_seed(seed)
    model = build_model(tokenizer, config_changes or {})
    optimizers = build_optimizers(model)
    output.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    settings = {"steps": steps, "seed": seed}
    if resume and (output / STATE_FILE).is_file():
        progress = load_state(output / STATE_FILE, model, optimizers, settings)
    batches = islice(iterate_steps(corpus, tokenizer, seed), progress.num_steps, None)
    _train(model, optimizers, batches, progress, steps, _Keeper(output, tokenizer, settings, progress.elapsed_s))
    save_teacher(model, tokenizer, output / "teacher")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    summary = TeacherSummary(
        num_parameters, progress.num_steps, progress.num_tokens, round(progress.elapsed_s, 1), seed
    )
    (output / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _train(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batches: Iterator[list[list[Row]]],
    progress: Progress,
    steps: int,
    keeper: "_Keeper",
) -> None:
    before_s, started = progress.elapsed_s, time.monotonic()
    while progress.num_steps < steps:
        train_step(model, optimizers, next(batches), progress, progress.num_steps / steps)
        progress.elapsed_s = before_s + time.monotonic() - started
        keeper.keep(model, optimizers, progress, progress.num_steps / steps)


def iterate_steps(corpus: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[list[Row]]]:
    """The batches of every step, of rows of one length each: those of SHORT_ROWS, then the long row.

    Raises: DataError if a corpus is missing or has no item for one of its rows.
    """
    sources = {}
    for name, lengths in ROW_TOKENS.items():
        trees = build_trees(load_pairs(corpus / name / "train.jsonl", tokenizer))
        for shorter, length in zip((0, *lengths), lengths, strict=False):
            fitting = [tree for tree in trees if shorter < tree.num_tokens <= length]
            sources[name, length] = iterate_rows(fitting, length, tokenizer.pad_token_id, seed)
    for long_name in cycle(LONG_ROWS):
        batches = [[next(sources[name, length]) for _ in range(number)] for name, length, number in SHORT_ROWS]
        yield [*batches, [next(sources[long_name, CONTEXT_TOKENS])]]


def build_model(tokenizer: PreTrainedTokenizerFast, config_changes: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of about 7 million random weights; 8 layers can be cut at 6, 4 and 3 and grouped by 2 and 4."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | config_changes))
    # What a layer adds starts at nothing, so that no early step has to unlearn noise.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, MATRIX_RATE, WEIGHT_DECAY),
        torch.optim.AdamW(others, EMBEDDING_RATE, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def compute_rate_frac(step: int, reached: float) -> float:
    """The share of the peak rates at `step` (from 0) when this share of the training is over."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1.0 - reached) / DECAY_FRAC)


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batches: list[list[Row]],
    progress: Progress,
    reached: float,
) -> None:
    """One optimizer step on the batches, whose gradients are summed; `progress` counts it."""
    total = sum(weight for batch in batches for row in batch for weight in row.weights)
    answer_losses = [_add_gradients(model, batch, total) for batch in batches]
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * compute_rate_frac(progress.num_steps, reached)
        optimizer.step()
        optimizer.zero_grad()
    progress.num_steps += 1
    progress.num_tokens += sum(len(row.ids) for batch in batches for row in batch)
    progress.wikisql_loss, progress.spider_loss = (
        loss if math.isnan(mean) else 0.97 * mean + 0.03 * loss
        for mean, loss in zip((progress.wikisql_loss, progress.spider_loss), answer_losses, strict=False)
    )


def _add_gradients(model: LlamaForCausalLM, rows: list[Row], total_weight: float) -> float:
    """Those of the rows' share of the loss; returns their mean loss over answer tokens."""
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_instructions()):
        losses, weights = compute_losses(model, rows)
    ((losses * weights).sum() / total_weight).backward()
    return float(losses.detach()[weights == 1.0].mean())


def compute_losses(model: LlamaForCausalLM, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """The loss of every predicted token that has a weight, and the weights. Shapes: 2 x [predicted tokens]."""
    ids_BT, positions_BT, trees_BT, branches_BT, weights_BT = (
        torch.tensor([getattr(row, name) for row in rows])
        for name in ("ids", "positions", "trees", "branches", "weights")
    )
    hidden_BTD = model.model(
        input_ids=ids_BT,
        attention_mask=compute_mask(trees_BT, branches_BT),
        position_ids=positions_BT,
        use_cache=False,
    ).last_hidden_state
    chosen = weights_BT[:, 1:] > 0
    logits = model.lm_head(hidden_BTD[:, :-1][chosen])
    return functional.cross_entropy(logits, ids_BT[:, 1:][chosen], reduction="none"), weights_BT[:, 1:][chosen]


class _Keeper:
    """Writes log lines, states and try-outs when it is time for each."""

    def __init__(
        self, output: Path, tokenizer: PreTrainedTokenizerFast, settings: dict[str, int], elapsed_s: float
    ) -> None:
        self._output = output
        self._settings = settings
        self._tokenizer = tokenizer
        self._last_s = dict.fromkeys((LOG_S, STATE_S, SNAPSHOT_S), elapsed_s)

    def keep(
        self,
        model: LlamaForCausalLM,
        optimizers: list[torch.optim.Optimizer],
        progress: Progress,
        reached: float,
    ) -> None:
        """What is due after a step."""
        if self._is_due(LOG_S, progress):
            save_log_line(self._output / "teacher.log", progress, reached)
        if self._is_due(STATE_S, progress):
            save_state(self._output / STATE_FILE, model, optimizers, self._settings, progress)
        if self._is_due(SNAPSHOT_S, progress):
            save_teacher(model, self._tokenizer, self._output / "teacher-latest")

    def _is_due(self, every_s: float, progress: Progress) -> bool:
        if progress.elapsed_s - self._last_s[every_s] < every_s:
            return False
        self._last_s[every_s] = progress.elapsed_s
        return True


def save_log_line(path: Path, progress: Progress, reached: float) -> None:
    """Adds a line on the progress to the file, and prints it."""
    line = (
        f"{progress.elapsed_s:6.0f} s  step {progress.num_steps}  {progress.num_tokens / 1e6:.2f}M tokens  "
        f"{progress.num_tokens / progress.elapsed_s:,.0f} tokens/s  loss of answers: wikisql "
        f"{progress.wikisql_loss:.4f}  spider {progress.spider_loss:.4f}  "
        f"ETA {progress.elapsed_s * (1 / reached - 1):.0f} s"
    )
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def save_state(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    settings: dict[str, int],
    progress: Progress,
) -> None:
    """Everything to go on from, written whole or not at all."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "settings": settings,
        "progress": asdict(progress),
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_state(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], settings: dict[str, int]
) -> Progress:
    """Puts what save_state wrote into the model and the optimizers; returns the progress.

    Raises: ConfigError if that training had other settings: the rates would follow two schedules.
    """
    state = torch.load(path, weights_only=True)
    if state.get("settings") != settings:
        raise ConfigError(
            f"{path}: of a training with {state.get('settings')}, not {settings}. Give these, or another output folder."
        )
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return Progress(**state["progress"])


def save_teacher(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """An ordinary Hugging Face folder: float32 safetensors, tokenizer, generation config."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def load_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the corpus.

    Raises: DataError if there is none.
    """
    if not (corpus / "tokenizer" / "tokenizer.json").is_file():
        raise DataError(f"{corpus}: no tokenizer in it. Give the folder that `corpus.py --output` wrote as --corpus.")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def main() -> int:
    """Trains with a line of progress every LOG_S seconds; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train the small Llama of the quality table.")
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="folder that corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new model")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"optimizer steps; default {NUM_STEPS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the rows")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the output folder")
    arguments = parser.parse_args()
    try:
        summary = train_teacher(arguments.corpus, arguments.output, arguments.steps, arguments.seed, arguments.resume)
    except SwiftKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(summary), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
