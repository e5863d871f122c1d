"""`swiftkv publish | promote | rollback` and `swiftkv models`, as typed."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.errors import CheckpointError, ConfigError, IntegrityError, RegistryError
from swiftkv.registry.measured import HASH_KEY, hash_student
from swiftkv.registry.registry import Registry


@pytest.fixture
def swiftkv(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_publish_says_what_exists_now(swiftkv, checkpoint, tmp_path):
    last = swiftkv("publish", checkpoint, "--name", "tiny").splitlines()[-1]
    assert last.startswith("published tiny@1 ") and str(tmp_path / "home" / "registry") in last
    assert Registry(tmp_path / "home" / "registry").resolve("tiny") == ("tiny", "1")


def test_promote_asks_for_the_gate_and_rollback_goes_back(swiftkv, checkpoint):
    for _ in range(2):
        swiftkv("publish", checkpoint, "--name", "tiny")
    with pytest.raises(RegistryError, match=r"tiny@1 was put to no gate"):
        swiftkv("promote", "tiny@1", "production")
    with pytest.raises(ConfigError, match="say why"):
        swiftkv("promote", "tiny@1", "production", "--force", " ")
    assert "tiny@production is now version 1" in swiftkv("promote", "tiny@1", "production", "--force", "a test")
    swiftkv("promote", "tiny@2", "production", "--force", "a test")
    assert "tiny@production is now version 1" in swiftkv("rollback", "tiny", "production")


def test_pull_writes_the_files(swiftkv, checkpoint, tmp_path, read_all):
    swiftkv("publish", checkpoint, "--name", "tiny")
    assert "pulled tiny@1" in swiftkv("models", "pull", "tiny", tmp_path / "pulled")
    assert read_all(tmp_path / "pulled") == read_all(checkpoint)


def test_diff_says_what_differs_and_what_is_shared(swiftkv, make_checkpoint):
    swiftkv("publish", make_checkpoint("one"), "--name", "tiny")
    swiftkv("publish", make_checkpoint("two", seed=1, intermediate_size=32), "--name", "tiny")
    shown = swiftkv("models", "diff", "tiny@1", "tiny@2")
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
    assert rows["intermediate_size"] == ["16", "32"]
    assert "model.safetensors" in rows and "hidden_size" not in rows and "tokenizer.json" not in rows
    assert shown.splitlines()[-1].startswith("shared: 2 bytes; only in tiny@1: ")


def test_gc_tells_before_it_removes(swiftkv, make_checkpoint):
    for seed in range(3):
        swiftkv("publish", make_checkpoint(f"seed-{seed}", seed=seed), "--name", "tiny")
    told = swiftkv("models", "gc", "--keep", "1", "--dry-run")
    assert "would remove tiny@1" in told and "would remove tiny@2" in told
    assert "tiny@1" in swiftkv("models", "list")
    done = swiftkv("models", "gc", "--keep", "1")
    assert done.replace("removed", "would remove").replace("freed", "would free") == told
    assert "tiny@1" not in swiftkv("models", "list")
    assert "verified tiny@3" in swiftkv("models", "verify", "tiny")


def test_show_explains_origin_and_quality(swiftkv, checkpoint, tmp_path):
    provenance = tmp_path / "provenance.json"
    record = {
        "teacher": {"name": "big-teacher"},
        "recipe": {"optimizer": {"learning_rate": 1e-5}},
        "training": {"final_loss": 0.123456789, "losses": list(range(100))},
        "evaluation": {"perplexity": {"teacher": 3.0, "student": 3.25}, "note [bold]": "[red]as is[/red]"},
    }
    provenance.write_text(json.dumps(record))
    store = tmp_path / "elsewhere"
    swiftkv("publish", checkpoint, "--name", "tiny", "--provenance", provenance, "--store", store)
    swiftkv("promote", "tiny", "best", "--force", "a test", "--store", store)
    shown = swiftkv("models", "show", "tiny", "--store", store)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines() if line.split()}
    assert rows["name"] == "big-teacher"
    assert rows["optimizer.learning_rate"] == "1e-05"
    assert rows["final_loss"] == "0.12346"
    assert rows["losses"] == "100 values, from 0 to 99"
    assert rows["perplexity.student"] == "3.25"
    assert rows["num_key_value_layers"] == "2"
    assert rows["aliases"] == "best"
    assert "note [bold]" in shown and "[red]as is[/red]" in shown
    assert "model.safetensors" in shown


def test_show_says_how_a_version_did_at_its_gate(swiftkv, checkpoint, tmp_path):
    limit = {"limit": "kl_nats at most 0.05", "found": 0.0123456, "passed": True}
    gate = {"gate": "held-out", "sha256": "0123456789abcdef", "passed": True, "limits": [limit]}
    provenance = tmp_path / "provenance.json"
    provenance.write_text(json.dumps({"evaluation": {"gate": gate, HASH_KEY: hash_student(checkpoint)}}))
    swiftkv("publish", checkpoint, "--name", "tiny", "--provenance", provenance)
    rows = [line.split() for line in swiftkv("models", "show", "tiny").splitlines()]
    assert ["gate.held-out", "(01234567)", "passed"] in rows
    assert ["gate.kl_nats", "at", "most", "0.05", "0.012346,", "passed"] in rows


def test_show_says_what_was_not_recorded(swiftkv, checkpoint):
    swiftkv("publish", checkpoint, "--name", "tiny")
    lines = [line.split() for line in swiftkv("models", "show", "tiny").splitlines()]
    assert ["evaluation", "not", "recorded"] in lines


def test_list_has_a_row_for_each_version(swiftkv, checkpoint):
    assert "No models" in swiftkv("models", "list")
    swiftkv("publish", checkpoint, "--name", "tiny")
    swiftkv("publish", checkpoint, "--name", "other", "--version", "v7")
    swiftkv("promote", "other@v7", "best", "--force", "a test")
    words = [line.split() for line in swiftkv("models", "list").splitlines()]
    assert [row[0] for row in words if row and "@" in row[0]] == ["other@v7", "tiny@1"]
    assert next(row for row in words if row and row[0] == "other@v7")[1] == "best"


def test_verify_reports_and_refuses(swiftkv, checkpoint, tmp_path):
    swiftkv("publish", checkpoint, "--name", "tiny")
    assert "verified tiny@1" in swiftkv("models", "verify", "tiny")
    weights = max((tmp_path / "home/registry/blobs").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        swiftkv("models", "verify", "tiny")


def test_a_family_that_is_not_in_the_table_is_refused(swiftkv, make_checkpoint):
    with pytest.raises(CheckpointError, match=r"Allowed: .*llama_swiftkv"):
        swiftkv("publish", make_checkpoint(model_type="qwen9_swiftkv"), "--name", "tiny")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "{", "not valid JSON"),
        (
            "p.json",
            '{"teachers": {}}',
            "teachers: unknown key. Nearest: teacher. Allowed here: data, evaluation, recipe, teacher, training",
        ),
        ("p.yaml", "teacher: 3", "teacher"),
    ],
)
def test_bad_provenance_is_refused(swiftkv, checkpoint, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        swiftkv("publish", checkpoint, "--name", "tiny", "--provenance", tmp_path / name)
    with pytest.raises(ConfigError, match="no such file"):
        swiftkv("publish", checkpoint, "--name", "tiny", "--provenance", tmp_path / "gone.json")


def test_the_registry_needs_no_heavy_import():
    code = (
        "import sys, swiftkv.cli.models; assert 'obstore' not in sys.modules, 'cli'; "
        "import swiftkv.registry.registry; "
        "assert not {'torch', 'ray', 'vllm', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
