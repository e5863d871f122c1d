"""The quickstart's corpus: what is in it, what is kept out of training, and that it is the same every time."""

import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swiftkv.errors import DataError

NUM_MODULES = 120
"""As in conftest.py's corpus_folder."""


@pytest.fixture(scope="module")
def tokenizer(corpus_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(corpus_folder / "tokenizer")


def load_records(path: Path) -> list[dict[str, str]]:
    # Not splitlines(): the texts hold form feeds and line separators.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def read_all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_builds_in_two_processes_give_the_same_bytes(
    corpus_script: ModuleType, corpus_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, corpus_script.__file__, "--output", str(tmp_path), "--limit-modules", str(NUM_MODULES)]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    first, second = read_all_files(corpus_folder), read_all_files(tmp_path)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert json.loads(result.stdout) == json.loads((corpus_folder / "summary.json").read_text(encoding="utf-8"))


def test_modules_are_either_training_or_held_out(corpus_script: ModuleType, corpus_folder: Path) -> None:
    train = {record["source"] for record in load_records(corpus_folder / "train_files.jsonl")}
    heldout = {record["source"] for record in load_records(corpus_folder / "heldout_files.jsonl")}
    assert train and heldout and not train & heldout
    assert all(corpus_script.is_heldout(path) for path in heldout)
    assert not any(corpus_script.is_heldout(path) for path in train)
    for name, allowed in (("train", train), ("heldout", heldout), ("prompts", heldout)):
        records = load_records(corpus_folder / f"{name}.jsonl")
        assert {record["source"].partition(":")[0] for record in records} <= allowed


def test_about_one_module_in_twenty_is_held_out(corpus_script: ModuleType) -> None:
    paths = [f"package_{index}/module.py" for index in range(4000)]
    assert 150 < sum(map(corpus_script.is_heldout, paths)) < 250


def test_no_held_out_function_is_in_the_training_texts(corpus_folder: Path) -> None:
    train = {record["text"] for record in load_records(corpus_folder / "train.jsonl")}
    heldout = [record["text"] for record in load_records(corpus_folder / "heldout.jsonl")]
    assert heldout and not train.intersection(heldout)
    training_modules = {record["text"] for record in load_records(corpus_folder / "train_files.jsonl")}
    assert not any(record["text"] in training_modules for record in load_records(corpus_folder / "heldout_files.jsonl"))


def test_functions_parse_to_the_function_that_their_source_names(corpus_folder: Path) -> None:
    for record in load_records(corpus_folder / "train.jsonl"):
        (function,) = ast.parse(record["text"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name == record["source"].rpartition(":")[2].rpartition(".")[2]


def test_no_function_of_a_module_is_lost(corpus_script: ModuleType) -> None:
    text = (
        "import os\n\x0c\n@property\n@other(\n    1)\ndef first(a):\n    def inner():\n        return 1\n    return a\n"
        "class A:\n\tclass B:\n\t\tasync def second(self):\n\t\t\treturn '''\nleft'''\n"
        "if os:\n    def third(): pass\n"
    )
    module = corpus_script.Module("a.py", text, ast.parse(text))
    functions = {function.qualified_name: function.text for function in corpus_script.iterate_functions(module)}
    assert list(functions) == ["first", "first.inner", "A.B.second", "third"]
    assert functions["first"].startswith("@property\n@other(\n    1)\ndef first(a):\n    def inner():")
    assert functions["first.inner"] == "def inner():\n    return 1\n"
    assert functions["A.B.second"] == "async def second(self):\n\treturn '''\nleft'''\n"


def test_function_records_are_the_lines_of_the_installed_file(corpus_folder: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    modules = {record["source"]: record["text"] for record in load_records(corpus_folder / "heldout_files.jsonl")}
    for path, text in modules.items():
        assert ast.dump(ast.parse((root / path).read_bytes())) == ast.dump(ast.parse(text))
    for record in load_records(corpus_folder / "heldout.jsonl"):
        lines = {line.strip() for line in modules[record["source"].partition(":")[0]].split("\n")}
        assert {line.strip() for line in record["text"].split("\n")} <= lines | {""}


def test_tests_tables_and_files_of_this_machine_are_left_out(corpus_script: ModuleType) -> None:
    paths = [path.as_posix() for path in corpus_script._find_paths(Path(sysconfig.get_path("stdlib")))]
    assert "json/decoder.py" in paths and "argparse.py" in paths
    unwanted = ("test/", "site-packages/", "encodings/", "idlelib/idle_test/", "_sysconfigdata", "pydoc_data/")
    assert [path for path in paths if path.startswith(unwanted) or "/tests/" in path] == []


def test_any_text_survives_the_tokenizer(corpus_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = random.Random(0)
    texts = [bytes(generator.randrange(256) for _ in range(300)).decode("latin-1") for _ in range(20)]
    texts += ["", " leading", "trailing  \n\n", "\t\r\n\x00\x0c", "héllo 你好 🙂 \u2028"]
    texts += [record["text"] for record in load_records(corpus_folder / "heldout_files.jsonl")]
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_has_its_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 4096
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    for token in ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"):
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
    ids = tokenizer("x = 1")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x = 1"


def test_chat_template_writes_turns_as_the_teacher_sees_them(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "def f():"},
        {"role": "assistant", "content": "\n    pass"},
        {"role": "user", "content": "def g():"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|begin|><|user|>def f():<|assistant|>\n    pass<|end|><|user|>def g():<|assistant|>")


def test_prompts_are_long_and_completions_short(corpus_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    prompts = load_records(corpus_folder / "prompts.jsonl")
    assert len(prompts) >= 4
    for record in prompts:
        assert 1350 <= count(record["prompt"]) <= 1500
        assert 56 <= count(record["completion"]) <= 66


def test_a_prompt_and_its_completion_are_a_piece_of_a_held_out_module(
    corpus_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    modules = {record["source"]: record["text"] for record in load_records(corpus_folder / "heldout_files.jsonl")}
    for record in load_records(corpus_folder / "prompts.jsonl"):
        whole = record["prompt"] + record["completion"]
        assert whole in modules[record["source"].partition(":")[0]]
        # No token spans the cut: otherwise the right answer could not follow the prompt's tokens.
        prompt_ids = tokenizer.encode(record["prompt"])
        assert tokenizer.encode(whole)[: len(prompt_ids)] == prompt_ids


def test_a_python_without_sources_is_refused(
    corpus_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_empty_folder(name: str, *_: Any) -> str:
        return str(tmp_path)

    monkeypatch.setattr(corpus_script.sysconfig, "get_path", give_empty_folder)
    with pytest.raises(DataError, match="0 modules with source"):
        corpus_script.build_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
