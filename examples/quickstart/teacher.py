"""Trains the quickstart's teacher: a small Llama that completes Python, in a minute or two on two CPU cores.

Not a recipe for good models, and no part of the product: `swiftkv` sees an ordinary Hugging Face folder.
The same seed, number of steps and number of threads give the same weights.
Called by: `make quickstart`, or by hand: `python teacher.py --corpus DIR --output DIR`.
Calls: model/precision.py, transformers; reads what corpus.py wrote.
Shapes: B rows, T tokens, V vocabulary.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

# Read once, when torch loads OpenMP. Threads that spin at each barrier made a step over ten times slower where
# something else used one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swiftkv.errors import ConfigError, DataError, SwiftKVError
from swiftkv.model.precision import has_bfloat16_instructions

NUM_STEPS = 500
MAX_SECONDS = 100.0
"""Training is shortened, not the machine's owner kept waiting, where NUM_STEPS would take longer."""

CONTEXT_TOKENS = 2048
STEP_TOKENS = 1024
"""Of a step on rows that are no longer than this; longer rows come one in a step."""

GRACE_FRAC = 0.1
"""Share of the seconds in which time does not count: a slow first step must not change what is trained."""

EVALUATION_TOKENS = 1536
EVALUATION_RANGES = {"0-512": (0, 512), "1024-1536": (1024, 1536)}
MAX_EVALUATION_ROWS = 48


@dataclass(frozen=True)
class Phase:
    """A share of the steps that is trained on rows of one length."""

    steps_frac: float
    row_tokens: int


@dataclass(frozen=True)
class TrainingSettings:
    """What was found best in about 100 s on two cores; jobs/LOG.md has the table."""

    phases: tuple[Phase, ...] = (Phase(0.88, 256), Phase(0.12, 2048))
    """Short rows are cheap to attend over; the long ones at the end put prompts of 1,500 tokens in distribution."""
    learning_rate: float = 1e-3
    """Peak of AdamW's for the layers' matrices; all rates rise for `warmup_steps` and fall to 0."""
    embedding_learning_rate: float = 0.06
    """Most rows of the embedding see few gradients in so few steps: at the matrices' rate they hardly move."""
    head_learning_rate: float = 4e-3
    """Also that of the norms."""
    warmup_steps: int = 20
    decay_frac: float = 0.7
    """Share of the steps, the last ones, over which the rates fall."""
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    chat_every: int = 10
    """One row in so many holds functions written as a chat, so that the chat markers mean something."""
    autocast: bool | None = None
    """bfloat16 matrix products; None: where the processor has instructions for them (twice as fast there)."""


@dataclass(frozen=True)
class TeacherSummary:
    """What came out; perplexities are of whole held-out modules, at two ranges of positions in a row."""

    num_parameters: int
    num_steps: int
    num_tokens: int
    training_s: float
    tokens_per_s: float
    final_loss: float
    autocast: bool
    heldout_perplexity: dict[str, float]


def train_teacher(
    corpus: Path,
    output: Path,
    seconds: float | None = MAX_SECONDS,
    steps: int | None = NUM_STEPS,
    seed: int = 0,
    settings: TrainingSettings = TrainingSettings(),
    config_changes: dict[str, Any] | None = None,
) -> TeacherSummary:
    """A trained Llama with its tokenizer in the folder `output`; returns what it took and how good it is.

    `steps` optimizer steps, or as many as fit in `seconds` if those are fewer; one of the
    two may be None. `config_changes` overrides keys of the model's config, for tests.
    Raises: ConfigError without steps and seconds, or if one is not above 0; DataError if `corpus` was
    not written by corpus.py.
    """
    if steps is None and seconds is None:
        raise ConfigError("steps and seconds are both None: nothing ends the training. Give at least one of them.")
    for name, value in (("steps", steps), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: {value} given, a number above 0 is allowed. Give more, or leave it out.")
    tokenizer = _load_tokenizer(corpus)
    torch.manual_seed(seed)
    model = build_model(tokenizer, config_changes or {})
    autocast = has_bfloat16_instructions() if settings.autocast is None else settings.autocast
    files = _encode(tokenizer, [record["text"] for record in _load_jsonl(corpus / "train_files.jsonl")])
    chats = _encode(tokenizer, build_chats(_load_jsonl(corpus / "train.jsonl"), seed))
    rows = RowSource(files, chats, settings.chat_every, tokenizer.bos_token_id, seed)
    started = time.monotonic()
    num_steps, num_tokens, loss = _train(model, rows, settings, steps, seconds, autocast)
    training_s = time.monotonic() - started
    perplexity = compute_heldout_perplexity(model, tokenizer, corpus / "heldout_files.jsonl", autocast)
    save_teacher(model, tokenizer, output)
    return TeacherSummary(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_steps=num_steps,
        num_tokens=num_tokens,
        training_s=round(training_s, 1),
        tokens_per_s=round(num_tokens / training_s, 1),
        final_loss=round(loss, 4),
        autocast=autocast,
        heldout_perplexity=perplexity,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, config_changes: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of about 5 million random weights; head size 64 is one that vLLM's CPU kernels take."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | config_changes))
    # What a layer adds starts small, as in GPT-2: with few steps the layers need not first unlearn noise.
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def build_chats(functions: list[dict[str, str]], seed: int) -> list[str]:
    """Functions cut in two at the end of a line: the user gives the first part, the assistant the rest."""
    random = Random(seed)
    chats = []
    for function in functions:
        lines = function["text"].rstrip("\n").split("\n")
        if len(lines) >= 3:
            cut = random.randint(1, min(len(lines) - 1, 12))
            given, rest = "\n".join(lines[:cut]), "\n" + "\n".join(lines[cut:])
            chats.append(f"<|user|>{given}<|assistant|>{rest}")
    return chats


class RowSource:
    """Rows of one length at a time, in an order that the seed fixes; no text comes twice in a phase."""

    def __init__(self, files: Tensor, chats: Tensor, chat_every: int, begin_id: int, seed: int) -> None:
        self._streams = {"files": files, "chats": chats}
        self._chat_every = chat_every
        self._begin_id = begin_id
        self._generator = torch.Generator().manual_seed(seed)

    def iterate_batches(self, row_tokens: int) -> Iterator[Tensor]:
        """Batches [B, row_tokens + 1] without end, of STEP_TOKENS inputs or one row; a row begins with <|begin|>."""
        rows = {name: self._iterate_rows(stream, row_tokens) for name, stream in self._streams.items()}
        num_given = 0
        while True:
            batch = []
            for _ in range(max(1, STEP_TOKENS // row_tokens)):
                num_given += 1
                name = "chats" if num_given % self._chat_every == 0 else "files"
                batch.append(next(rows[name]))
            yield torch.stack(batch)

    def _iterate_rows(self, stream: Tensor, row_tokens: int) -> Iterator[Tensor]:
        num_rows = len(stream) // row_tokens
        if num_rows == 0:
            raise DataError(
                f"The corpus has {len(stream)} tokens, fewer than one row of {row_tokens}. "
                "Build it from more modules with corpus.py."
            )
        begin = torch.tensor([self._begin_id])
        while True:
            for index in torch.randperm(num_rows, generator=self._generator).tolist():
                yield torch.cat([begin, stream[index * row_tokens : (index + 1) * row_tokens]])


def _train(
    model: LlamaForCausalLM,
    rows: RowSource,
    settings: TrainingSettings,
    steps: int | None,
    seconds: float | None,
    autocast: bool,
) -> tuple[int, int, float]:
    optimizer = _build_optimizer(model, settings)
    model.train()
    smooth_loss = math.nan
    step, num_tokens, reached = 0, 0, 0.0
    phase: Phase | None = None
    started = time.monotonic()
    with _build_progress() as progress:
        task = progress.add_task("training", total=1.0, loss=math.nan, speed=0.0, step=0)
        while reached < 1.0:
            current = _choose_phase(settings.phases, reached)
            if current != phase:
                phase, batches = current, rows.iterate_batches(current.row_tokens)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * compute_rate_frac(settings, step, reached)
            batch = next(batches)
            loss = _train_step(model, batch, optimizer, settings.max_gradient_norm, autocast)
            smooth_loss = loss if math.isnan(smooth_loss) else 0.95 * smooth_loss + 0.05 * loss
            step += 1
            num_tokens += batch.shape[0] * current.row_tokens
            elapsed_s = time.monotonic() - started
            reached = compute_reached(step, steps, elapsed_s, seconds)
            progress.update(task, completed=reached, loss=smooth_loss, speed=num_tokens / elapsed_s, step=step)
    return step, num_tokens, smooth_loss


def compute_reached(step: int, steps: int | None, elapsed_s: float, seconds: float | None) -> float:
    """The share of the training that is done after `step` steps, by steps or by time, whichever is more.

    On a machine that is fast enough only the steps count, so that the same steps give the same weights.
    """
    by_steps = step / steps if steps is not None else 0.0
    if seconds is None:
        return by_steps
    grace_s = GRACE_FRAC * seconds
    return max(by_steps, (elapsed_s - grace_s) / (seconds - grace_s))


def compute_rate_frac(settings: TrainingSettings, step: int, reached: float) -> float:
    """The share of the peak rates at `step` (from 0): up in a line, level, down in a line to 0 at the end."""
    warmup = (step + 1) / settings.warmup_steps
    return min(1.0, warmup, (1.0 - reached) / settings.decay_frac)


def _train_step(
    model: LlamaForCausalLM, batch: Tensor, optimizer: torch.optim.Optimizer, max_norm: float, autocast: bool
) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_BTV = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def compute_heldout_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, autocast: bool
) -> dict[str, float]:
    """Perplexity per token of the modules in `path` at each of EVALUATION_RANGES, in rows of EVALUATION_TOKENS.

    Rows do not span modules; modules shorter than a row are left out. No row at all gives an empty result.
    """
    model.eval()
    rows = []
    for record in _load_jsonl(path):
        ids = torch.tensor(tokenizer.backend_tokenizer.encode(record["text"], add_special_tokens=False).ids)
        rows += [ids[: len(ids) // EVALUATION_TOKENS * EVALUATION_TOKENS].view(-1, EVALUATION_TOKENS)]
    rows_BT = torch.cat(rows)
    rows_BT = rows_BT[:: max(1, math.ceil(len(rows_BT) / MAX_EVALUATION_ROWS))]
    losses = []
    for row_T in rows_BT:
        inputs_T = torch.cat([torch.tensor([tokenizer.bos_token_id]), row_T[:-1]])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits_TV = model(input_ids=inputs_T[None], use_cache=False).logits[0]
        losses.append(functional.cross_entropy(logits_TV.float(), row_T, reduction="none"))
    if not losses:
        return {}
    loss_T = torch.stack(losses).mean(dim=0)
    return {
        name: round(math.exp(loss_T[first:end].mean().item()), 3) for name, (first, end) in EVALUATION_RANGES.items()
    }


def save_teacher(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """An ordinary Hugging Face folder: float32 safetensors, tokenizer with chat template, generation config."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _load_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    if not (corpus / "tokenizer" / "tokenizer.json").is_file():
        raise DataError(f"{corpus}: no tokenizer in it. Give the folder that `corpus.py --output` wrote.")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def _load_jsonl(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Build the corpus again with `corpus.py --output {path.parent}`.")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one stream of ids, each between <|begin|> and <|end|>."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        stream += encoding.ids
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def _choose_phase(phases: tuple[Phase, ...], reached: float) -> Phase:
    end = 0.0
    for phase in phases:
        end += phase.steps_frac
        if reached < end:
            return phase
    return phases[-1]


def _build_optimizer(model: LlamaForCausalLM, settings: TrainingSettings) -> torch.optim.Optimizer:
    inner = list(model.model.layers.parameters())
    matrices = [parameter for parameter in inner if parameter.ndim == 2]
    norms = [parameter for parameter in inner if parameter.ndim == 1] + [model.model.norm.weight]
    groups = [
        {"params": matrices, "peak": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": [model.model.embed_tokens.weight], "peak": settings.embedding_learning_rate, "weight_decay": 0.0},
        {"params": [model.lm_head.weight, *norms], "peak": settings.head_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True)


def _build_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s  ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def main() -> int:
    """Trains with a progress bar and prints the summary as JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train the quickstart's small Llama on the corpus.")
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="folder that corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new model")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"optimizer steps; default {NUM_STEPS}")
    parser.add_argument(
        "--seconds", type=float, default=MAX_SECONDS, help="fewer steps where they would take longer than this"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the rows")
    arguments = parser.parse_args()
    try:
        summary = train_teacher(arguments.corpus, arguments.output, arguments.seconds, arguments.steps, arguments.seed)
    except SwiftKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(summary), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
