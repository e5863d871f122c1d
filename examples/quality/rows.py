"""Task items as training rows in which items with the same table or schema share one copy of it.

A tree is a beginning that several prompts have in common, and a branch per item, which sees the beginning and itself.
The model computes for each item what it computes for that item alone, at a fraction of the cost where prompts are
long schemas. Does not train (teacher.py).
Called by: teacher.py. Calls: torch.

Shapes: B rows, T tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from swiftkv.errors import DataError

BRANCHES = 4
"""Items that share one copy at the most; more fill rows worse."""
LOOKAHEAD = 64
"""Trees among which those that fill a row are looked for."""
PROMPT_WEIGHT = 0.2
"""Of a prompt token's loss; an answer token's is 1."""

Pair = tuple[list[int], list[int]]
"""Prompt ids, and response ids with the end token."""


@dataclass(frozen=True)
class Tree:
    """Items whose prompts begin with the same tokens."""

    prefix: list[int]
    branches: list[Pair]
    """What is left of each prompt, at least one token, and the response."""

    @property
    def num_tokens(self) -> int:
        """Positions it takes in a row."""
        return len(self.prefix) + sum(len(prompt) + len(response) for prompt, response in self.branches)


@dataclass(frozen=True)
class Row:
    """Trees side by side; the lists have one entry per token."""

    ids: list[int]
    positions: list[int]
    """In the item that the token belongs to."""
    trees: list[int]
    """Which of the row's trees it belongs to; -1 where the row is filled up."""
    branches: list[int]
    """Which of its tree's branches it belongs to, from 1; 0 is the prefix."""
    weights: list[float]
    """Of the loss of predicting it from the token before; 0 where that is of another item."""


def load_pairs(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[Pair]:
    """The items of a file that corpus.py wrote, as ids.

    Raises: DataError if there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the folder that `corpus.py --output` wrote as --corpus.")
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    prompts, responses = (
        tokenizer.backend_tokenizer.encode_batch([record[key] for record in records]) for key in ("prompt", "response")
    )
    return [
        (prompt.ids, [*response.ids, tokenizer.eos_token_id])
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def build_trees(pairs: list[Pair]) -> list[Tree]:
    """The pairs in trees of at most BRANCHES whose prompts have half of their tokens or more in common."""
    trees: list[Tree] = []
    group: list[Pair] = []
    for pair in sorted(pairs):
        if group and (len(group) == BRANCHES or 2 * _count_common(group[0][0], pair[0]) < len(pair[0])):
            trees.append(_build_tree(group))
            group = []
        group.append(pair)
    return [*trees, _build_tree(group)]


def build_row(trees: list[Tree], row_tokens: int, pad_id: int) -> Row:
    """The trees side by side, filled up to `row_tokens`."""
    row = Row([], [], [], [], [])
    for index, tree in enumerate(trees):
        length = len(tree.prefix)
        _append(row, tree.prefix, 0, index, 0, PROMPT_WEIGHT)
        for branch, (prompt, response) in enumerate(tree.branches, start=1):
            _append(row, prompt, length, index, branch, PROMPT_WEIGHT)
            _append(row, response, length + len(prompt), index, branch, 1.0, is_start=False)
    _append(row, [pad_id] * (row_tokens - len(row.ids)), 0, -1, 0, 0.0)
    return row


def compute_mask(trees_BT: Tensor, branches_BT: Tensor) -> Tensor:
    """What each token sees: of its tree's prefix and its own branch, itself and what comes before.

    Shapes: [B, T] each -> [B, 1, T, T] bool, queries before keys.
    """
    is_same_tree = trees_BT[:, :, None] == trees_BT[:, None]
    is_seen_branch = (branches_BT[:, None] == 0) | (branches_BT[:, :, None] == branches_BT[:, None])
    return (is_same_tree & is_seen_branch).tril()[:, None]


def iterate_rows(trees: list[Tree], row_tokens: int, pad_id: int, seed: int) -> Iterator[Row]:
    """Rows without end, in an order that the seed fixes; all trees come once before one comes twice.

    Raises: DataError if there are no trees.
    """
    if not trees:
        raise DataError(f"No item of a corpus fits rows of {row_tokens} tokens. Build the corpus from more data.")
    random = Random(seed)
    while True:
        waiting = random.sample(trees, len(trees))
        while waiting:
            chosen, room = [], row_tokens
            for index, tree in enumerate(waiting[:LOOKAHEAD]):
                if tree.num_tokens <= room:
                    chosen.append(index)
                    room -= tree.num_tokens
            yield build_row([waiting[index] for index in chosen], row_tokens, pad_id)
            for index in reversed(chosen):
                del waiting[index]


def _build_tree(group: list[Pair]) -> Tree:
    # Every branch keeps a token of its prompt: what predicts the answer's first token is its own.
    length = min(min(_count_common(group[0][0], prompt), len(prompt) - 1) for prompt, _ in group)
    return Tree(group[0][0][:length], [(prompt[length:], response) for prompt, response in group])


def _count_common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _append(
    row: Row, ids: list[int], position: int, tree: int, branch: int, weight: float, is_start: bool = True
) -> None:
    row.ids.extend(ids)
    row.positions.extend(range(position, position + len(ids)))
    row.trees.extend([tree] * len(ids))
    row.branches.extend([branch] * len(ids))
    row.weights.extend(([0.0] if is_start and ids else []) + [weight] * (len(ids) - is_start))
