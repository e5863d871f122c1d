"""Documents out of files: every kind gives the same documents, and what is wrong is named with what to change."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pandas
import pytest

from swiftkv.distill.recipe import SourceSettings
from swiftkv.distill.sources import load_source
from swiftkv.errors import DataError

TEXTS = ["one\ntwo", "é ü", "three"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)


def write_lines(path: Path, *lines: Any) -> Path:
    """Records as JSON lines; what is text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(*files: Path, **settings: Any) -> list[Any]:
    source = load_source(SourceSettings(files=list(files), **settings))
    return [document.content for document in source.read()]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    records = [{"text": text, "unasked": index if index else "mixed"} for index, text in enumerate(TEXTS)]
    lines = write_lines(tmp_path / "[a] *.jsonl", *records)
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps(records, indent=1))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    parquet = tmp_path / "a.parquet"
    pandas.DataFrame({"text": TEXTS}).to_parquet(parquet)
    texts = [tmp_path / f"{index}.txt" for index in range(3)]
    for path, text in zip(texts, TEXTS, strict=True):
        path.write_text(text)
    for files in ([lines], [whole], [packed], [parquet], texts):
        assert read(*files) == TEXTS, files
    assert read(lines, packed, max_documents=4) == [*TEXTS, TEXTS[0]]


def test_pairs_and_messages_come_from_their_columns(tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", {"q": "2+2?", "a": "4"}, {"q": "", "a": "b"})
    assert read(pairs, format="pair", prompt_column="q", response_column="a") == [["2+2?", "4"], ["", "b"]]
    expected = [[{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]]
    messages = write_lines(tmp_path / "a.jsonl", {"messages": expected[0]})
    other = [{"from": name, "value": name[0]} for name in ("system", "human", "gpt")]
    renamed = write_lines(tmp_path / "b.jsonl", {"turns": other})
    assert read(messages, format="chat") == expected
    found = read(renamed, format="chat", messages_column="turns")
    assert [message["role"] for message in found[0]] == ["system", "user", "assistant"]
    assert [message["content"] for message in found[0]] == ["s", "h", "g"]


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ([], {}, "a.jsonl: no documents"),
        ([{"text": "x"}, "not json"], {}, "a.jsonl:2: not valid JSON .*one JSON object per line"),
        ([{"text": "x"}, "[1]"], {}, "a.jsonl:2: not a JSON object"),
        ([{"body": "x", "id": 1}], {}, "no column 'text'; there are: body, id. Set text_column"),
        ([{"prompt": "x"}], {"format": "pair"}, "no column 'response'; there are: prompt. Set response_column"),
        ([{"text": "x"}], {"format": "chat"}, "no column 'messages'; there are: text. Set messages_column"),
        ([{"text": "x"}, {"text": 3}], {}, "document 2: column 'text' holds a int; give text"),
        ([{"text": "x"}, {"body": "y"}], {}, "document 2: column 'text' holds nothing"),
        ([{"messages": "x"}], {"format": "chat"}, "column 'messages' holds a str; give a list"),
        ([{"messages": [{"role": "user", "content": "x"}]}, {"messages": []}], {"format": "chat"}, "holds no message"),
        ([{"messages": ["x"]}], {"format": "chat"}, "a message that is a str; give role and content"),
        ([{"messages": [{"role": "user", "body": "x"}]}], {"format": "chat"}, "a message with role, body; give role"),
        ([{"messages": [{"role": "user", "content": [1]}]}], {"format": "chat"}, "both text"),
    ],
)
def test_bad_documents_are_refused_by_place(
    tmp_path: Path, lines: list[Any], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write_lines(tmp_path / "a.jsonl", *lines), **settings)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    lines, text = write_lines(tmp_path / "a.jsonl", {"text": "x"}), write_lines(tmp_path / "b.txt", "x")
    broken = write_lines(tmp_path / "c.parquet", "x")
    for files, message in (
        ([tmp_path / "gone.jsonl"], "gone.jsonl: no such file"),
        ([lines, text], "a.jsonl and .*b.txt are of different kinds"),
        ([write_lines(tmp_path / "d.csv", "x")], r"d.csv: .* Use .jsonl, .json, .parquet, .txt"),
        ([broken], "c.parquet: cannot be read .*footer"),
    ):
        with pytest.raises(DataError, match=message):
            read(*files)


def test_reading_the_first_documents_leaves_the_rest_of_the_file_alone(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", *({"text": "x" * 1000} for _ in range(20_000)), "not json")
    source = load_source(SourceSettings(files=[file]))
    assert len(list(islice(source.read(), 3))) == 3
    with pytest.raises(DataError, match=r"a.jsonl:20001"):
        list(source.read())


def test_the_hash_of_files_follows_their_content_and_not_their_names(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", {"text": "x"})
    same, other = write_lines(tmp_path / "b.jsonl", {"text": "x"}), write_lines(tmp_path / "c.jsonl", {"text": "y"})
    first_hash, same_hash, other_hash, both = (
        load_source(SourceSettings(files=files)).compute_hash() for files in ([first], [same], [other], [first, other])
    )
    assert first_hash == same_hash
    assert len({first_hash, other_hash, both}) == 3


def test_a_named_data_set_is_read_and_kept_at_home(tmp_path: Path) -> None:
    """A folder stands for the hub, as it does for `datasets`."""
    folder = tmp_path / "stands-for-the-hub"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *({"text": text} for text in TEXTS))
    first, again, other = (
        load_source(SourceSettings(name=str(folder), split=split)) for split in ("train", "train", "train[:2]")
    )
    assert [document.content for document in first.read()] == TEXTS
    assert [document.content for document in other.read()] == TEXTS[:2]
    assert first.compute_hash() == again.compute_hash() != other.compute_hash()
    assert list((tmp_path / "home" / "cache" / "datasets").glob("**/*.arrow"))
    with pytest.raises(DataError, match=r"cannot be loaded .*Check name, subset and split"):
        load_source(SourceSettings(name=str(folder), split="nowhere"))


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such/data: the Hugging Face hub cannot be reached .* as `files`"):
        load_source(SourceSettings(name="no-such/data"))
