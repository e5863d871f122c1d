"""Versions that share their teacher's files: what they cost, and that they come back as the same tensors."""

import shutil
from pathlib import Path

import fakes
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.errors import CheckpointError, ConfigError, IntegrityError
from swiftkv.model import delta
from swiftkv.model.checkpoint import load_student, save_student
from swiftkv.model.convert import convert_teacher, freeze_teacher
from swiftkv.registry.registry import Registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "home"))
    return Registry(tmp_path / "home" / "registry")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return fakes.write_teacher(tmp_path / "teacher", num_shards=2, dtype=torch.bfloat16)


def write_student(teacher: Path, folder: Path, seed: int) -> Path:
    model = convert_teacher(teacher, 3)
    torch.manual_seed(seed)
    for parameter in freeze_teacher(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_student(model, folder, teacher)
    return folder


def publish(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["publish", *map(str, arguments), "--name", "tiny"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def count_stored_bytes(registry: Registry) -> int:
    return sum(info.size_bytes for info in registry._storage.list_files("blobs").values())


def require_same_tensors(folder: Path, student: Path) -> None:
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = load_file(student / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_base_is_stored_once_and_each_version_costs_its_own_tensors(registry, teacher, tmp_path):
    (teacher / "LICENSE.txt").write_text("as you like")
    students = [write_student(teacher, tmp_path / f"student-{seed}", seed) for seed in range(2)]
    assert f"sharing the files of {teacher}" in publish(students[0], "--base", teacher)
    before = count_stored_bytes(registry)
    publish(students[1], "--base", teacher)
    own = load_file(students[1] / "model.safetensors")
    own_bytes = sum(tensor.nbytes for name, tensor in own.items() if "swiftkv" in name)
    assert own_bytes < count_stored_bytes(registry) - before < own_bytes + 4096, "the header, and nothing else"
    for version, student in zip("12", students, strict=True):
        folder = registry.fetch(f"tiny@{version}").path
        require_same_tensors(folder, student)
        ids = torch.tensor([[7, 3, 250, 11]])
        with torch.no_grad():
            assert torch.equal(load_student(folder)(ids).logits, load_student(student)(ids).logits)
    assert (folder / "LICENSE.txt").read_text() == "as you like"
    for shard in teacher.glob("*.safetensors"):
        assert shard.read_bytes() in [file.read_bytes() for file in folder.glob("*.safetensors")]


def test_a_delta_folder_is_published_as_the_whole(registry, teacher, tmp_path):
    student = write_student(teacher, tmp_path / "student", 0)
    CliRunner().invoke(app, ["delta", "save", str(student), str(tmp_path / "delta"), "--base", str(teacher)])
    publish(tmp_path / "delta")
    require_same_tensors(registry.fetch("tiny").path, student)
    assert not list((tmp_path / "home").glob("publishing-*"))


def test_a_base_by_reference_is_not_stored_and_is_compared(registry, teacher, tmp_path):
    student = write_student(teacher, tmp_path / "student", 0)
    assert "beside a reference to the files of" in publish(student, "--base", teacher, "--reference-base")
    base_bytes = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
    assert count_stored_bytes(registry) < base_bytes
    registry.verify("tiny")
    require_same_tensors(registry.fetch("tiny").path, student)
    shutil.rmtree(registry.fetch("tiny").path)
    shard = sorted(teacher.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model-00001-of-00003\.safetensors: part 1 of 1: SHA-256"):
        registry.fetch("tiny")
    shutil.rmtree(teacher)
    with pytest.raises(CheckpointError, match="no such folder"):
        registry.fetch("tiny")


def test_another_teacher_is_refused(registry, teacher, tmp_path):
    student = write_student(teacher, tmp_path / "student", 0)
    other = fakes.write_teacher(tmp_path / "other", dtype=torch.bfloat16, seed=5)
    with pytest.raises(CheckpointError, match="is not the tensor of"):
        publish(student, "--base", other)
    with pytest.raises(ConfigError, match="which base"):
        publish(student, "--reference-base")
    assert registry.list_models() == []


def test_a_model_of_the_hub_is_published_as_it_is(registry, teacher, tmp_path, monkeypatch):
    """As its cache has it: links in a snapshot to files elsewhere."""
    student = write_student(teacher, tmp_path / "student", 0)
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in student.iterdir():
        (snapshot / file.name).symlink_to(file)
    asked = []

    def download(name: str, **settings: object) -> str:
        asked.append((name, settings["revision"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    publish("someone/tiny", "--revision", "abc")
    assert asked == [("someone/tiny", "abc")]
    require_same_tensors(registry.fetch("tiny").path, student)


def test_the_name_of_the_delta_record_is_one() -> None:
    assert delta.RECORD_FILE == "delta.json", "cli/publish.py looks for it without loading torch"


def test_the_verdict_on_a_student_holds_for_its_version_beside_the_base(registry, teacher, tmp_path):
    """As in the quickstart: the student is measured whole, and published as its own tensors beside the teacher's."""
    student, other = (write_student(teacher, tmp_path / f"student-{seed}", seed) for seed in range(2))
    provenance, gate, text = (tmp_path / name for name in ("provenance.json", "gate.yaml", "text.jsonl"))
    provenance.write_text("{}")
    gate.write_text("{name: any, limits: [{figure: student_after.kl_nats, at_most: 1.0e+9}]}")
    text.write_text('{"text": "' + "some words " * 40 + '"}\n')
    words = ["evaluate", student, "--data", text, "--row-tokens", 32, "--gate", gate, "--provenance", provenance]
    assert CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False).exit_code == 0
    publish(student, "--base", teacher, "--provenance", provenance)
    registry.promote("tiny@1", "production")
    with pytest.raises(CheckpointError, match="of another student"):
        publish(other, "--base", teacher, "--provenance", provenance)
