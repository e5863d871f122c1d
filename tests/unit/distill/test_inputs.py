"""What is wrong with a recipe's inputs is found before a cluster is there, by name, with what to change.

The likeliest faults, with the whole of what `swiftkv distill` says, are in tests/unit/test_wrong_configurations.py.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import TinyShape, write_teacher

from swiftkv.distill.inputs import check_inputs
from swiftkv.distill.recipe import Recipe
from swiftkv.errors import ConfigError, DataError


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    write_lines(tmp_path / "text.jsonl", *({"text": "x" * 50} for _ in range(20)))
    return write_teacher(tmp_path / "teacher")


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def build_recipe(folder: Path, source: dict[str, Any] | None = None, **changes: dict[str, Any]) -> Recipe:
    """Of the teacher and the text in a folder."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"train": [{"files": [str(folder / "text.jsonl")]} | (source or {})]},
        "training": {"steps": 1},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return Recipe.model_validate({"teacher": str(folder / "teacher"), **sections})


def change_tokenizer(teacher: Path, **settings: Any) -> None:
    path = teacher / "tokenizer_config.json"
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_good_inputs_give_the_cut(teacher: Path, tmp_path: Path) -> None:
    spec = check_inputs(build_recipe(tmp_path, cut={"num_key_value_layers": 4, "key_value_group_size": 2}))
    assert (spec.num_key_value_layers, spec.key_value_group_size) == (4, 2)


def test_the_hub_is_not_asked(teacher: Path, tmp_path: Path) -> None:
    check_inputs(build_recipe(tmp_path, data={"train": [{"name": "no-such/data"}]}))


def test_ray_is_not_needed(teacher: Path, tmp_path: Path) -> None:
    code = (
        "import sys, swiftkv.distill.inputs as i, swiftkv.distill.recipe as r; from pathlib import Path;"
        f"i.check_inputs(r.load_recipe(Path({str(tmp_path / 'recipe.yaml')!r}))); assert 'ray' not in sys.modules"
    )
    (tmp_path / "recipe.yaml").write_text(build_recipe(tmp_path).model_dump_json())
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "text.jsonl", {"text": "x"})
    write_teacher(tmp_path / "teacher", TinyShape(vocab_size=300), config_changes={"vocab_size": 280})
    with pytest.raises(ConfigError, match=r"mixed vocabularies: .* up to 299, but the model embeds only 280"):
        check_inputs(build_recipe(tmp_path))


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        ({"eos_token": None}, {}, "no end token"),
        ({"chat_template": None}, {"format": "chat"}, "no chat template"),
        ({}, {"text_column": "body"}, "no column 'body'; there are: text"),
        ({}, {"format": "pair"}, "no column 'prompt'"),
    ],
)
def test_documents_that_cannot_be_used_are_refused(
    teacher: Path, tmp_path: Path, settings: dict[str, Any], source: dict[str, Any], message: str
) -> None:
    change_tokenizer(teacher, **settings)
    with pytest.raises(DataError, match=message):
        check_inputs(build_recipe(tmp_path, source))


def test_first_documents_must_carry_a_loss(teacher: Path, tmp_path: Path) -> None:
    unanswered = {"messages": [{"role": "user", "content": "hello"}]}
    file = write_lines(tmp_path / "chats.jsonl", *[unanswered] * 20)
    source = {"files": [str(file)], "format": "chat"}
    with pytest.raises(DataError, match="chats.jsonl: all masked: none of the first 16 documents has an answer"):
        check_inputs(build_recipe(tmp_path, source))
    change_tokenizer(teacher, chat_template="{{ raise_exception('no') }}")
    answered = {"messages": [*unanswered["messages"], {"role": "assistant", "content": "hi"}]}
    write_lines(file, *[answered] * 20)
    with pytest.raises(DataError, match=r"chats.jsonl, document 1: the tokenizer's chat template refuses it"):
        check_inputs(build_recipe(tmp_path, source))


def test_unanswered_conversations_will_do_where_all_positions_carry_loss(teacher: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "hello"}]})
    source = {"files": [str(file)], "format": "chat"}
    everywhere = {"train": [source], "loss_on": "all"}
    check_inputs(build_recipe(tmp_path, data=everywhere))
