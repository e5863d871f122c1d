"""Tokens and loss positions, against templates small enough to know the answer by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import BEGIN_ID, END_ID, SPECIAL_TOKENS, write_tokenizer
from tokenizers import Tokenizer, processors

from swiftkv.distill.sources import Document
from swiftkv.distill.tokenise import Example, tokenise_documents
from swiftkv.errors import DataError
from swiftkv.model.checkpoint import load_tokenizer

USER, ASSISTANT = (256 + SPECIAL_TOKENS.index(name) for name in ("<|user|>", "<|assistant|>"))
NEWLINE = ord("\n")

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""Says which tokens are the answer: its text and the end token, but not the line break."""
FORGETTING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As templates of thinking models: a thought (!) before the last answer only."""
CHANGING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
STRICT = "{{ raise_exception('roles must alternate') }}"

CHAT = [("user", "hi"), ("assistant", "yo"), ("user", "u"), ("assistant", "v")]


def build_tokenizer(folder: Path, adds_begin: bool = False, **settings: str | None) -> Any:
    """The byte tokenizer with other settings; None takes one away."""
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    if adds_begin:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", BEGIN_ID)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def tokenise(tokenizer: Any, kind: Any, *contents: Any, loss_on: str = "answers") -> list[tuple[list[int], list[int]]]:
    """Token ids and the positions with loss of each example."""
    documents = [Document(f"document {number}", content) for number, content in enumerate(contents, start=1)]
    return [describe(example) for example in tokenise_documents(tokenizer, documents, kind, loss_on)]


def describe(example: Example) -> tuple[list[int], list[int]]:
    assert example.input_ids.dtype == "int32"
    assert example.predicts.dtype == bool
    return example.input_ids.tolist(), example.predicts.nonzero()[0].tolist()


def chat(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_texts_end_with_one_end_token_and_carry_loss_everywhere(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert tokenise(tokenizer, "text", "ab", "c<|end|>") == [([97, 98, END_ID], [0, 1, 2]), ([99, END_ID], [0, 1])]


def test_pairs_carry_loss_from_the_last_prompt_token_on(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    ids = [97, 98, 99, 100, END_ID]
    assert tokenise(tokenizer, "pair", ["abc", "d"]) == [(ids, [2, 3])]
    assert tokenise(tokenizer, "pair", ["abc", "d"], loss_on="all") == [(ids, [0, 1, 2, 3, 4])]
    assert tokenise(tokenizer, "pair", ["", "d"]) == [([100, END_ID], [0])]


def test_texts_and_prompts_begin_as_served_prompts_do(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, adds_begin=True)
    assert tokenise(tokenizer, "text", "a") == [([BEGIN_ID, 97, END_ID], [0, 1, 2])]
    assert tokenise(tokenizer, "pair", ["a", "b"]) == [([BEGIN_ID, 97, 98, END_ID], [1, 2])]
    assert tokenise(tokenizer, "pair", ["a", "b"])[0][0][:2] == tokenizer("a")["input_ids"]


def test_answers_are_found_by_comparing_the_conversation_before_and_after(tmp_path: Path) -> None:
    ids = [USER, *b"hi\n", ASSISTANT, *b"yo\n", USER, *b"u\n", ASSISTANT, *b"v\n"]
    # yo\n are the tokens 5, 6, 7 and v\n 12, 13; each is predicted one position before.
    tokenizer = build_tokenizer(tmp_path)
    assert tokenise(tokenizer, "chat", chat(*CHAT)) == [(ids, [4, 5, 6, 11, 12])]
    assert tokenise(tokenizer, "chat", chat(*CHAT), loss_on="all") == [(ids, list(range(14)))]
    assert tokenise(tokenizer, "chat", chat(*CHAT[:3])) == [(ids[:8], [4, 5, 6])]  # nothing to learn after the answer
    assert tokenise(tokenizer, "chat", chat(CHAT[0])) == [([], [])]


def test_answers_that_the_template_marks_are_taken_as_marked(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, chat_template=MARKED)
    ids = [USER, *b"hi\n", ASSISTANT, *b"yo", END_ID, NEWLINE, USER, *b"u\n", ASSISTANT, *b"v", END_ID, NEWLINE]
    assert tokenise(tokenizer, "chat", chat(*CHAT)) == [(ids, [4, 5, 6, 12, 13])]


def test_answers_that_change_as_the_conversation_goes_on_are_examples_of_their_own(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, chat_template=FORGETTING)
    first = [USER, *b"hi\n", ASSISTANT, *b"!yo\n"]
    second = [USER, *b"hi\n", ASSISTANT, *b"yo\n", USER, *b"u\n", ASSISTANT, *b"!v\n"]
    assert tokenise(tokenizer, "chat", chat(*CHAT)) == [(first, [4, 5, 6, 7]), (second, [11, 12, 13])]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"eos_token": None}, "text", "has no end token.* Set eos_token"),
        ({"chat_template": None}, "chat", "no chat template.* chat_template.jinja into the teacher's folder.*pair"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(
    tmp_path: Path, settings: dict[str, None], kind: str, message: str
) -> None:
    tokenizer = build_tokenizer(tmp_path, **settings)
    with pytest.raises(DataError, match=message):
        tokenise(tokenizer, kind, chat(*CHAT))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHANGING, "document 2: the tokenizer's chat template shows .*{% generation %}"),
        (STRICT, r"document 2: .* refuses it \(roles must alternate\)"),
    ],
)
def test_a_conversation_that_the_template_cannot_show_is_told_and_ends_nothing(
    tmp_path: Path, template: str, problem: str
) -> None:
    tokenizer = build_tokenizer(tmp_path, chat_template=template)
    documents = [Document(f"document {n}", chat(*messages)) for n, messages in enumerate([CHAT[:1], CHAT[:2]], start=1)]
    unanswered, refused = tokenise_documents(tokenizer, documents, "chat", "answers")
    assert (unanswered.problem, describe(unanswered)) == ("", ([], []))
    assert re.fullmatch(problem + ".*", refused.problem)
    assert describe(refused) == ([], [])
