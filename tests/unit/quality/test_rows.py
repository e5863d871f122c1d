"""Rows of trees: every item computes what it computes alone, and counts once."""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from swiftkv.errors import DataError

Scripts = dict[str, ModuleType]
PAD = 1

SCHEMA = list(range(10, 30))
PAIRS = [
    ([*SCHEMA, 40, 41, 42], [50, 51, 0]),
    ([*SCHEMA, 40, 43], [52, 0]),
    ([*SCHEMA, 44], [53, 54, 55, 0]),
    ([5, 6, 7], [8, 0]),
    ([60], [61, 0]),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def restore(tree: Any) -> list[tuple[list[int], list[int]]]:
    return [(tree.prefix + prompt, response) for prompt, response in tree.branches]


def test_trees_hold_every_item_and_share_what_is_common(scripts: Scripts) -> None:
    trees = scripts["rows"].build_trees(PAIRS)
    assert sorted(pair for tree in trees for pair in restore(tree)) == sorted(PAIRS)
    shared = next(tree for tree in trees if len(tree.branches) == 3)
    assert shared.prefix == SCHEMA and shared.num_tokens == 20 + (3 + 3) + (2 + 2) + (1 + 4)
    assert len(trees) == 3


def test_trees_stay_small_and_equal_prompts_keep_a_token_each(scripts: Scripts) -> None:
    pairs = [([1, 2, 3], [number, 0]) for number in range(10)]
    trees = scripts["rows"].build_trees(pairs)
    assert [len(tree.branches) for tree in trees] == [4, 4, 2]
    assert all(prompt == [3] for tree in trees for prompt, _ in tree.branches)


def test_losses_in_a_row_are_those_of_each_item_alone(scripts: Scripts, model: LlamaForCausalLM) -> None:
    rows, teacher = scripts["rows"], scripts["teacher"]
    row = rows.build_row(rows.build_trees(PAIRS), 64, PAD)
    losses, weights = teacher.compute_losses(model, [row])
    alone = []
    for prompt, response in PAIRS:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        alone += cross_entropy(logits, torch.tensor(response), reduction="none").tolist()
    assert sorted(losses[weights == 1.0].tolist()) == pytest.approx(sorted(alone), rel=1e-4)
    # Prompt tokens that follow one of the same branch or prefix: of the schema, once, and of what comes after it. The
    # prompts of one item are cut before their last token.
    assert int((weights < 1.0).sum()) == 19 + (2 + 1 + 0) + 1 + 0


def test_mask_by_hand(scripts: Scripts) -> None:
    mask = scripts["rows"].compute_mask(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 1, 2, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_all_trees_come_once_before_one_comes_twice(scripts: Scripts) -> None:
    rows = scripts["rows"]
    trees = rows.build_trees([([index, 3], [4] * (1 + index % 7) + [0]) for index in range(100, 300)])
    num_tokens = sum(tree.num_tokens for tree in trees)
    seen: Counter[int] = Counter()
    num_rows = 0
    for row in rows.iterate_rows(trees, 40, PAD, seed=0):
        num_rows += 1
        seen.update(token for token in row.ids if token >= 100)
        assert len(row.ids) == len(row.positions) == len(row.trees) == len(row.branches) == len(row.weights) == 40
        if sum(seen.values()) == 200:
            break
    assert set(seen.values()) == {1} and len(seen) == 200
    assert num_tokens / (40 * num_rows) > 0.95, "rows are well filled"


def test_the_seed_fixes_the_order(scripts: Scripts) -> None:
    rows = scripts["rows"]
    trees = rows.build_trees([([index, 3], [4, 0]) for index in range(100, 160)])
    first, same, other = (
        [row.ids for row, _ in zip(rows.iterate_rows(trees, 16, PAD, seed), range(30), strict=False)]
        for seed in (0, 0, 1)
    )
    assert first == same != other


def test_rows_of_nothing_are_refused(scripts: Scripts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fits rows of 512 tokens"):
        next(scripts["rows"].iterate_rows([], 512, PAD, 0))
    with pytest.raises(DataError, match="no such file.*--corpus"):
        scripts["rows"].load_pairs(tmp_path / "train.jsonl", None)
