"""Builds the corpora of the quality table, with held-out items and one tokenizer, from a folder of task data.

Downloads nothing and trains no model; `swiftkv` never imports it.
Called by: run.py, or by hand: `python corpus.py --data FOLDER --output DIR`. Calls: tokenizers, transformers.

What it leaves in DIR (the same bytes each time):

    <corpus>/train.jsonl    <corpus>/heldout.jsonl    {"prompt", "response"}, the recipes' format `pair`
    tokenizer/              byte-level BPE, trained on the training items only, loadable with AutoTokenizer
    summary.json            the counts
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from swiftkv.errors import DataError, SwiftKVError

VOCAB_SIZE = 4096
CONTEXT_TOKENS = 1024
END, PAD = "<|end|>", "<|pad|>"
SEPARATOR = "\n\n"
"""Between context and instruction."""

MAX_RESPONSE_TOKENS = 383
"""Items with longer answers are left out: their prompts would have to be cut below 640 tokens."""


@dataclass(frozen=True)
class Corpus:
    """One folder of the data and how it is cut."""

    name: str
    heldout_frac: float
    heldout_by: str
    """The item's key whose hash decides; the id of items without that key."""


CORPORA = (
    # By item: a model of a few million parameters does not carry over to tables and schemas it has never seen, so
    # most have questions on both sides. Spider asks for many queries in two wordings, which may be parted too: its
    # score tells how well a model finds the query of a question, not whether it can write a new one.
    Corpus("wikisql", 0.05, "id"),
    Corpus("spider", 0.10, "id"),
    Corpus("squality", 0.10, "context_id"),
    Corpus("qmsum", 0.10, "context_id"),
    Corpus("thealgorithms", 0.10, "context_id"),
)


@dataclass(frozen=True)
class Item:
    """A task item, its prompt in the two parts that are cut differently."""

    context: str
    instruction: str
    response: str
    heldout: bool

    @property
    def prompt(self) -> str:
        """The plain prompt."""
        return self.context + self.instruction


@dataclass(frozen=True)
class CorpusCounts:
    """Of one corpus; tokens are of prompts and responses, both sides together."""

    num_train: int
    num_heldout: int
    num_left_out: int
    num_cut_prompts: int
    prompt_tokens: int
    response_tokens: int


def build_corpora(data: Path, output: Path) -> dict[str, CorpusCounts]:
    """Every corpus and the tokenizer under `output`; returns the counts.

    Raises: DataError if `data` lacks one of the corpora.
    """
    items = {corpus.name: list(load_items(data, corpus)) for corpus in CORPORA}
    tokenizer = train_tokenizer(item for corpus in items.values() for item in corpus if not item.heldout)
    tokenizer.save_pretrained(output / "tokenizer")
    counts = {name: save_corpus(output / name, corpus, tokenizer) for name, corpus in items.items()}
    summary = {name: asdict(count) for name, count in counts.items()}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return counts


def load_items(data: Path, corpus: Corpus) -> Iterator[Item]:
    """The items of a corpus in the order of its file.

    Raises: DataError if the folder has no such corpus.
    """
    folder = data / corpus.name
    if not (folder / "items.jsonl.gz").is_file():
        raise DataError(f"{folder}: no items.jsonl.gz there. Give the folder that holds {corpus.name}/ as --data.")
    contexts = {record["context_id"]: record["text"] for record in _load_jsonl_gz(folder / "contexts.jsonl.gz")}
    for record in _load_jsonl_gz(folder / "items.jsonl.gz"):
        context = contexts.get(record["context_id"], "")
        yield Item(
            context=context,
            instruction=f"{SEPARATOR if context else ''}{record['instruction']}\n",
            response=record["response"],
            heldout=is_heldout(record[corpus.heldout_by] or record["id"], corpus.heldout_frac),
        )


def is_heldout(key: str, frac: float) -> bool:
    """Whether the items with this key are kept from training; depends on nothing but the key."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < frac


def train_tokenizer(items: Iterable[Item]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens that spells numbers by their digits, so that they can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_iterate_texts(items), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def save_corpus(folder: Path, items: list[Item], tokenizer: PreTrainedTokenizerFast) -> CorpusCounts:
    """train.jsonl and heldout.jsonl, every prompt short enough for its answer to fit in the context."""
    folder.mkdir(parents=True, exist_ok=True)
    sides: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    num_cut, prompt_tokens, response_tokens = 0, 0, 0
    for item in items:
        num_response = _count_tokens(tokenizer, item.response)
        if num_response > MAX_RESPONSE_TOKENS:
            continue
        prompt = cut_prompt(item, tokenizer, CONTEXT_TOKENS - num_response - 1)
        sides[item.heldout].append({"prompt": prompt, "response": item.response})
        num_cut += prompt != item.prompt
        prompt_tokens += _count_tokens(tokenizer, prompt)
        response_tokens += num_response
    _save_jsonl(folder / "train.jsonl", sides[False])
    _save_jsonl(folder / "heldout.jsonl", sides[True])
    num_kept = len(sides[False]) + len(sides[True])
    return CorpusCounts(
        len(sides[False]), len(sides[True]), len(items) - num_kept, num_cut, prompt_tokens, response_tokens
    )


def cut_prompt(item: Item, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> str:
    """The prompt, with as much taken from the start of its context as makes it `max_tokens` or fewer."""
    offsets = tokenizer.backend_tokenizer.encode(item.prompt, add_special_tokens=False).offsets
    if len(offsets) <= max_tokens:
        return item.prompt
    start = offsets[len(offsets) - max_tokens][0]
    # At white space, so that the words of the rest are cut into the same tokens as before.
    while start < len(item.context) and not item.context[start].isspace():
        start += 1
    return item.prompt[min(start, len(item.context)) :]


def _iterate_texts(items: Iterable[Item]) -> Iterator[str]:
    last_context = None
    for item in items:
        if item.context != last_context:
            yield item.context
        last_context = item.context
        yield item.instruction
        yield item.response


def _count_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _load_jsonl_gz(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _save_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> int:
    """Builds the corpora and prints the counts; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the corpora of the quality table.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder with wikisql/, spider/ ...")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    arguments = parser.parse_args()
    try:
        counts = build_corpora(arguments.data, arguments.output)
    except SwiftKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: asdict(count) for name, count in counts.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
