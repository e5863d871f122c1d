"""Documents into token ids and the positions at which student and teacher are compared.

Position t predicts token t+1: what a position is compared on is the distribution of the token after it. Does not read
documents (sources.py) or put them into rows (packing.py).
Called by: distill/inputs.py, distill/prepare.py.

Shapes: T tokens of a document.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from swiftkv.distill.sources import Document, Message
from swiftkv.errors import DataError

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Example:
    """A tokenised document."""

    input_ids: npt.NDArray[np.int32]
    """[T]."""
    predicts: npt.NDArray[np.bool_]
    """[T]; True where the prediction of the next token carries loss."""
    problem: str = ""
    """Why a conversation has no tokens, of which one in a large collection should not end a run."""


def tokenise_documents(
    tokenizer: Any, documents: Sequence[Document], kind: Literal["text", "chat", "pair"], loss_on: str
) -> list[Example]:
    """Each document as one example; a chat as one for each answer where its template shows answers in two ways.

    Texts and prompts begin as the tokenizer begins a prompt that is served.
    A conversation that the chat template refuses, or shows in a way that cannot be followed, is empty and has a
    `problem`.
    Raises: DataError if the tokenizer lacks an end token or a chat template.
    """
    check_tokenizer(tokenizer, kind)
    if kind == "text":
        return _tokenise_texts(tokenizer, [document.content for document in documents])
    if kind == "pair":
        return _tokenise_pairs(tokenizer, [document.content for document in documents], loss_on)
    return [example for document in documents for example in _try_chat(tokenizer, document, loss_on)]


def check_tokenizer(tokenizer: Any, kind: str) -> None:
    """Raises: DataError if the tokenizer lacks what documents of this kind need."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{tokenizer.name_or_path}: its tokenizer has no end token, which separates documents. "
            "Set eos_token in its tokenizer_config.json."
        )
    if kind == "chat":
        try:
            tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, which the format chat needs. Put "
                "chat_template.jinja into the teacher's folder, or use the format pair."
            ) from None


def _tokenise_texts(tokenizer: Any, texts: list[str]) -> list[Example]:
    end = tokenizer.eos_token_id
    tokenised = (ids if ids[-1:] == [end] else [*ids, end] for ids in _encode(tokenizer, texts, as_prompt=True))
    return [_build_example(ids, range(1, len(ids) + 1)) for ids in tokenised]


def _tokenise_pairs(tokenizer: Any, pairs: list[list[str]], loss_on: str) -> list[Example]:
    """Prompt and response apart: a server sees the prompt alone, and no token of it may depend on the response."""
    prompts = _encode(tokenizer, [prompt for prompt, _ in pairs], as_prompt=True)
    responses = _encode(tokenizer, [response for _, response in pairs], as_prompt=False)
    examples = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = [*prompt, *response, tokenizer.eos_token_id]
        predicted = range(1, len(ids) + 1) if loss_on == "all" else range(len(prompt), len(ids))
        examples.append(_build_example(ids, predicted))
    return examples


def _try_chat(tokenizer: Any, document: Document, loss_on: str) -> list[Example]:
    try:
        return _tokenise_chat(tokenizer, document, loss_on)
    except DataError as error:
        return [replace(_build_example([], []), problem=str(error))]


def _tokenise_chat(tokenizer: Any, document: Document, loss_on: str) -> list[Example]:
    messages: list[Message] = document.content
    if loss_on == "all":
        ids = _render(tokenizer, document.place, messages)
        return [_build_example(ids, range(1, len(ids) + 1))]
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        rendered = _render_chat(tokenizer, document.place, messages, return_assistant_tokens_mask=True)
        return [_build_example(rendered["input_ids"], np.flatnonzero(rendered["assistant_masks"]))]
    answers = [_find_answer(tokenizer, document.place, messages, i) for i, m in enumerate(messages) if _is_answer(m)]
    return _join_answers(answers)


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _find_answer(tokenizer: Any, place: str, messages: list[Message], index: int) -> tuple[list[int], int]:
    """The conversation up to this answer, and its number of tokens before the answer."""
    prompt = _render(tokenizer, place, messages[:index], add_generation_prompt=True) if index else []
    whole = _render(tokenizer, place, messages[: index + 1])
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{place}: the tokenizer's chat template shows a conversation with its answer otherwise than the same "
            "conversation before the answer, so the answer's tokens cannot be told. Put {% generation %} and "
            "{% endgeneration %} around them in the template, or use the format pair."
        )
    return whole, len(prompt)


def _join_answers(answers: list[tuple[list[int], int]]) -> list[Example]:
    """One example for all answers, or for each its own.

    Templates of thinking models drop an answer's thoughts when the conversation goes on: then only the conversation
    up to an answer shows it as it was given.
    """
    if not answers:
        return [_build_example([], [])]
    last, _ = answers[-1]
    if all(last[: len(whole)] == whole for whole, _ in answers):
        return [_build_example(last, [t for whole, first in answers for t in range(first, len(whole))])]
    return [_build_example(whole, range(first, len(whole))) for whole, first in answers]


def _render(tokenizer: Any, place: str, messages: list[Message], **options: Any) -> list[int]:
    return list(_render_chat(tokenizer, place, messages, **options)["input_ids"])


def _render_chat(tokenizer: Any, place: str, messages: list[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tokenizer_kwargs={"verbose": False}, **options)
    except TemplateError as error:
        raise DataError(
            f"{place}: the tokenizer's chat template refuses it ({error}). Leave it out, or change the template."
        ) from None


def _encode(tokenizer: Any, texts: list[str], as_prompt: bool) -> list[list[int]]:
    """`as_prompt` begins as a served prompt does, with a begin token where the tokenizer adds one."""
    encoded = tokenizer(texts, add_special_tokens=as_prompt, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _build_example(ids: Sequence[int], predicted: Sequence[int] | npt.NDArray[np.int64]) -> Example:
    """With loss where the tokens `predicted` are predicted; the one after the last may be among them."""
    predicts = np.zeros(len(ids), dtype=np.bool_)
    positions = np.asarray(predicted, dtype=np.int64) - 1
    predicts[positions[positions >= 0]] = True
    return Example(np.asarray(ids, dtype=np.int32), predicts)
