"""Deltas: written, restored bit for bit, refused for another base; and the layout that Snowflake's tools read."""

import json
import shutil
from pathlib import Path

import fakes
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from swiftkv.bench.models import LLAMA_8B_SHAPE
from swiftkv.cli.delta import delta_app
from swiftkv.errors import CheckpointError, ConfigError, IntegrityError
from swiftkv.model.checkpoint import load_student, load_tokenizer, save_student
from swiftkv.model.convert import convert_teacher, freeze_teacher
from swiftkv.model.delta import Base, export_snowflake, load_delta_record, restore_delta, save_delta
from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.spec import SwiftKVSpec

IDS = torch.tensor([[7, 3, 250, 11, 42, 5]])


def load_tensors(folder: Path) -> fakes.Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def train_a_little(teacher: Path) -> SwiftKVForCausalLM:
    """A student of the teacher with other projections, as a run leaves it: they are float32."""
    model = convert_teacher(teacher, 3)
    torch.manual_seed(1)
    for parameter in freeze_teacher(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def build_pair(folder: Path, **settings: object) -> tuple[Path, Path]:
    """A teacher and its distilled student as whole checkpoints."""
    teacher = fakes.write_teacher(folder / "teacher", **settings)  # type: ignore[arg-type]
    save_student(train_a_little(teacher), folder / "student", teacher)
    return teacher, folder / "student"


SETTINGS = {
    "plain": {},
    "tied": {"tied": True},
    "shards": {"num_shards": 3},
    "bfloat16": {"dtype": torch.bfloat16, "num_shards": 2},
    "biases": {"family": "qwen2"},
    "head norms": {"family": "qwen3"},
    "experts": {"family": "qwen3_moe"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_restored_delta_is_the_whole_checkpoint_bit_for_bit(tmp_path: Path, settings: dict[str, object]) -> None:
    teacher, student = build_pair(tmp_path, **settings)
    save_delta(student, tmp_path / "delta", Base.from_folder(teacher))
    restore_delta(tmp_path / "delta", teacher, tmp_path / "restored")
    expected, restored = load_tensors(student), load_tensors(tmp_path / "restored")
    assert expected.keys() == restored.keys()
    for name, tensor in expected.items():
        assert restored[name].dtype == tensor.dtype, name
        assert torch.equal(restored[name], tensor), name
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "restored" / name).read_bytes() == (student / name).read_bytes()
    with torch.no_grad():
        for is_teacher in (False, True):
            logits = [load_student(f)(IDS, teacher=is_teacher).logits for f in (student, tmp_path / "restored")]
            assert torch.equal(*logits)
    assert load_tokenizer(tmp_path / "restored")("hi")["input_ids"] == list(b"hi")


def test_a_delta_holds_the_new_tensors_alone(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, dtype=torch.bfloat16)
    save_delta(student, tmp_path / "delta", Base.from_folder(teacher))
    tensors = load_tensors(tmp_path / "delta")
    assert len(tensors) == 1 + 3 * 3  # the norm; Q, K and V of three later layers
    assert all("swiftkv" in name and tensor.dtype == torch.bfloat16 for name, tensor in tensors.items())
    shape = fakes.TinyShape()
    count = SwiftKVSpec.from_hf_config(json.loads((student / "config.json").read_text())).count_trained_parameters()
    assert sum(tensor.numel() for tensor in tensors.values()) == count > shape.hidden_size


def test_sizes_of_the_docstring_are_those_of_the_spec() -> None:
    spec = SwiftKVSpec(LLAMA_8B_SHAPE, 16)
    own = 2 * spec.count_trained_parameters()
    assert round(own / 1e9, 1) == 0.8
    assert round((own + spec.teacher.compute_weight_bytes()) / 1e9, 1) == 16.9


def test_a_model_in_memory_gives_the_same_delta_as_its_folder(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, dtype=torch.bfloat16)
    save_delta(student, tmp_path / "one", Base.from_folder(teacher))
    save_delta(train_a_little(teacher), tmp_path / "deep" / "two", Base.from_folder(teacher))
    for name in ("delta.safetensors", "delta.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "deep" / "two" / name).read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["two"]


@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", "config.json"])
def test_a_flipped_byte_in_the_base_is_refused_by_name(tmp_path: Path, file: str) -> None:
    teacher, student = build_pair(tmp_path, num_shards=3)
    save_delta(student, tmp_path / "delta", Base(teacher, "someone/teacher", "abc"))
    content = bytearray((teacher / file).read_bytes())
    content[-9] ^= 1
    (teacher / file).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{file}: has SHA-256.*someone/teacher at revision abc"):
        restore_delta(tmp_path / "delta", teacher, tmp_path / "restored")
    (teacher / file).unlink()
    with pytest.raises(IntegrityError, match=f"{file}: is missing"):
        restore_delta(tmp_path / "delta", teacher, tmp_path / "restored")
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "student", "delta"}


def test_another_base_is_refused_when_saved_and_when_restored(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path)
    other = fakes.write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="is not the tensor of .*other"):
        save_delta(student, tmp_path / "delta", Base.from_folder(other))
    assert not (tmp_path / "delta").exists()
    save_delta(student, tmp_path / "delta", Base.from_folder(teacher))
    with pytest.raises(IntegrityError, match=r"other/model\.safetensors"):
        restore_delta(tmp_path / "delta", other, tmp_path / "restored")


def test_a_base_in_another_dtype_is_refused(tmp_path: Path) -> None:
    teacher, _ = build_pair(tmp_path, dtype=torch.bfloat16)
    save_student(convert_teacher(teacher, 3, dtype=torch.float32), tmp_path / "float32", teacher)
    with pytest.raises(CheckpointError, match="in the dtype"):
        save_delta(tmp_path / "float32", tmp_path / "delta", Base.from_folder(teacher))


def test_a_stripped_checkpoint_gets_the_teachers_projections_back(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path)
    tensors = load_tensors(student)
    later = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in (3, 4, 5) for kind in "qkv"]
    save_file({n: t for n, t in tensors.items() if n not in later}, student / "model.safetensors", {"format": "pt"})
    assert not load_student(student).model.has_teacher
    save_delta(student, tmp_path / "delta", Base.from_folder(teacher))
    restore_delta(tmp_path / "delta", teacher, tmp_path / "restored")
    assert load_student(tmp_path / "restored").model.has_teacher
    assert load_tensors(tmp_path / "restored").keys() == tensors.keys()


def test_the_bases_bytes_are_linked_not_written_again(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, num_shards=2)
    save_delta(student, tmp_path / "delta", Base.from_folder(teacher))
    restore_delta(tmp_path / "delta", teacher, tmp_path / "restored")
    restored = sorted((tmp_path / "restored").glob("*.safetensors"))
    assert len(restored) == 3
    for original, link in zip(sorted(teacher.glob("*.safetensors")), restored, strict=False):
        assert original.samefile(link)


def test_a_base_in_the_hubs_cache_is_recorded_by_name_and_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny-model" / "snapshots" / "0123abc"
    shutil.copytree(fakes.write_teacher(tmp_path / "teacher"), snapshot)
    save_student(train_a_little(snapshot), tmp_path / "student", snapshot)
    save_delta(tmp_path / "student", tmp_path / "delta", Base.from_folder(snapshot))
    record = load_delta_record(tmp_path / "delta")
    assert (record.base_name, record.base_revision) == ("someone/tiny-model", "0123abc")


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path)
    base = Base.from_folder(teacher)
    with pytest.raises(CheckpointError, match="'llama', which is not a SwiftKV checkpoint"):
        save_delta(teacher, tmp_path / "delta", base)
    save_delta(student, tmp_path / "delta", base)
    with pytest.raises(CheckpointError, match="exists already"):
        save_delta(student, tmp_path / "delta", base)
    with pytest.raises(CheckpointError, match="a delta, not a whole checkpoint"):
        export_snowflake(tmp_path / "delta", tmp_path / "exported")
    with pytest.raises(CheckpointError, match=r"no delta\.json"):
        restore_delta(student, teacher, tmp_path / "restored")
    (tmp_path / "delta" / "delta.json").write_text('{"base_name": "a"}')
    with pytest.raises(ConfigError, match="base_sha256: missing"):
        restore_delta(tmp_path / "delta", teacher, tmp_path / "restored")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_export_has_every_key_and_tensor_that_snowflakes_code_reads(tmp_path: Path, family: str) -> None:
    scaling = fakes.LLAMA3_ROPE_SCALING if family == "llama" else None
    student = fakes.write_student(
        tmp_path / "student",
        family=family,
        num_key_value_layers=2,
        key_value_group_size=2,
        rope_scaling=scaling,
        new_rope_keys=True,
        config_changes={"swiftkv": None},
    )
    export_snowflake(student, tmp_path / "exported", torch.bfloat16)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    expected = {
        "architectures": [f"{family.capitalize()}SwiftKVForCausalLM"],
        "model_type": f"{family}_swiftkv",
        "swiftkv": True,
        "num_key_value_layers": 2,
        "key_value_group_size": 2,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    assert (config.get("rope_scaling") or {}).get("factor") == (scaling and 8.0)
    written, exported = load_tensors(student), load_tensors(tmp_path / "exported")
    assert exported.keys() == written.keys()
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in written.items())


def test_an_export_keeps_the_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    export_snowflake(fakes.write_student(tmp_path / "student"), tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["torch_dtype"] == "float32"


def test_what_snowflakes_code_cannot_load_is_not_exported(tmp_path: Path) -> None:
    mistral = fakes.write_student(tmp_path / "mistral", family="mistral")
    with pytest.raises(CheckpointError, match="no mistral_swiftkv models, only llama_swiftkv and qwen2_swiftkv"):
        export_snowflake(mistral, tmp_path / "exported")
    stripped = fakes.write_student(tmp_path / "stripped", keep_teacher_projections=False)
    with pytest.raises(CheckpointError, match="stored without the teacher's own"):
        export_snowflake(stripped, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_command_line_saves_and_restores_from_the_base_that_the_delta_names(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path)
    runner = CliRunner()
    saved = runner.invoke(delta_app, ["save", str(student), str(tmp_path / "delta"), "--base", str(teacher)])
    assert saved.exit_code == 0, saved.output
    assert "%)" in saved.output
    restored = runner.invoke(delta_app, ["restore", str(tmp_path / "delta"), str(tmp_path / "restored")])
    assert restored.exit_code == 0, restored.output
    assert load_tensors(tmp_path / "restored").keys() == load_tensors(student).keys()
