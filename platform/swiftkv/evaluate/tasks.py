"""Scores a student, or its teacher, by a task's own measure: greedy answers against the right ones.

Answers come from the engine that serves: a loss of quality may be the engine's as well as the weights'. Where answers
are only compared with the teacher's, the Hugging Face model does it. Does not read files and does not decide whether a
version is good enough.
Called by: examples/quality/scores.py.
Calls: engine/llm.py, evaluate/compare.py.

Shapes: B items of a batch, T tokens.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftkv.engine.llm import generate_greedy
from swiftkv.errors import DataError
from swiftkv.evaluate.compare import Comparison, compare_at_positions, compute_batch_tokens
from swiftkv.model.modeling import SwiftKVForCausalLM

Item = Mapping[str, str]
"""A task item: its `prompt` and the right `response`."""


@dataclass(frozen=True)
class TaskScore:
    """Answers of one model to the items of one task."""

    items: int
    exact_match_frac: float
    """Part of the answers that equal the response, white space at the ends aside; case counts."""
    rouge_l: float
    """Mean over the items of the F1 of `compute_rouge_l`; for answers with no single right wording."""
    matches: tuple[bool, ...]
    """Whether each answer equals its response, in the order of the items."""


@dataclass(frozen=True)
class MatchDifference:
    """Exact match of a student less that of its teacher on the same items."""

    difference_frac: float
    standard_error_frac: float
    """Of the difference; smaller than that of two separate samples, since both find the same items hard."""


def score_answers(answers: Sequence[str], items: Sequence[Item]) -> TaskScore:
    """The answers to all items, in their order, scored."""
    pairs = [(answer.strip(), item["response"].strip()) for answer, item in zip(answers, items, strict=True)]
    matches = tuple(answer == response for answer, response in pairs)
    rouge_l = math.fsum(compute_rouge_l(answer, response) for answer, response in pairs) / len(pairs)
    return TaskScore(len(pairs), sum(matches) / len(pairs), rouge_l, matches)


def compare_matches(teacher: TaskScore, student: TaskScore) -> MatchDifference:
    """How much worse (below 0) or better the student answers, and how sure that is; of two items or more.

    Source: the standard error of a mean of paired differences.
    """
    pairs = zip(teacher.matches, student.matches, strict=True)
    differences = [int(own) - int(other) for other, own in pairs]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return MatchDifference(mean, math.sqrt(variance / len(differences)))


def compare_answers(model: SwiftKVForCausalLM, tokenizer: Any, items: Sequence[Item]) -> Comparison:
    """Student against teacher at the positions that predict the right answers and the end tokens after them.

    Raises: DataError if there are no items or the tokenizer has no end token; CheckpointError if the checkpoint was
    stored without its teacher.
    """
    end_token = _find_end_token(tokenizer)
    prompts = _tokenise(tokenizer, [item["prompt"] for item in items], as_prompt=True)
    responses = _tokenise(tokenizer, [item["response"] for item in items], as_prompt=False)
    rows = [[*prompt, *response, end_token] for prompt, response in zip(prompts, responses, strict=True)]
    batches = _split_by_length([len(row) for row in rows], compute_batch_tokens(model.config.vocab_size))
    return compare_at_positions(
        model, (_build_scored_rows([rows[i] for i in batch], [len(prompts[i]) for i in batch]) for batch in batches)
    )


def generate_answers(llm: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What an engine (`run_engine`) finds likeliest after each prompt, up to the end token or `max_new_tokens`.

    Special tokens are left out.
    Raises: DataError if there are no prompts or the tokenizer has no end token.
    """
    end_token = _find_end_token(tokenizer)
    ids = _tokenise(tokenizer, prompts, as_prompt=True)
    outputs = generate_greedy(llm, ids, max_new_tokens, ignore_eos=False, stop_token_ids=[end_token])
    answers = [[token for token in output.outputs[0].token_ids if token != end_token] for output in outputs]
    return list(tokenizer.batch_decode(answers, skip_special_tokens=True))


def compute_rouge_l(answer: str, response: str) -> float:
    """F1 of the longest word sequence that both texts have in this order, gaps allowed; 0 to 1.

    Words are runs of letters and digits, in lower case.
    Source: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1, with beta = 1.
    """
    words, right_words = (re.findall(r"\w+", text.lower()) for text in (answer, response))
    if not words or not right_words:
        return float(words == right_words)
    return 2 * _count_common_sequence(words, right_words) / (len(words) + len(right_words))


def _count_common_sequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]


def _find_end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end token, which ends an answer. Set eos_token in its folder.")
    return int(tokenizer.eos_token_id)


def _tokenise(tokenizer: Any, texts: Sequence[str], as_prompt: bool) -> list[list[int]]:
    """Prompt and response apart, as served: no token of a prompt may depend on the response."""
    if not texts:
        raise DataError("0 items given; a score needs at least one. Check the held-out file.")
    return list(tokenizer(list(texts), add_special_tokens=as_prompt, verbose=False)["input_ids"])


def _split_by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length that are padded to at most `max_tokens`, or of one."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _build_scored_rows(rows: list[list[int]], prompt_lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids, filled up behind, and where they predict an answer: causal models do not look behind. Shapes: 2 x [B, T]."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    places_T = torch.arange(longest)
    first_B1, end_B1 = (torch.tensor([[n] for n in ns]) for ns in (prompt_lengths, [len(row) for row in rows]))
    return ids_BT, (places_T >= first_B1 - 1) & (places_T < end_B1 - 1)
