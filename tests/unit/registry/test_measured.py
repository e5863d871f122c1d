"""A gate's verdict that comes with a folder: bound to the student's tensors, whatever files they are in."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from swiftkv.errors import CheckpointError
from swiftkv.registry.evaluations import GateResult
from swiftkv.registry.manifest import Provenance
from swiftkv.registry.measured import hash_student

GATE = GateResult(gate="g", sha256="0" * 64, passed=True, limits=()).model_dump(mode="json")


def test_the_hash_is_that_of_names_shapes_and_bytes(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    expected = hashlib.sha256()
    for name in sorted(name for name in tensors if "swiftkv" in name):
        expected.update(json.dumps([name, "F32", list(tensors[name].shape)]).encode() + tensors[name].tobytes())
    assert hash_student(checkpoint) == expected.hexdigest()


def test_files_and_teacher_do_not_matter_and_each_student_tensor_does(checkpoint):
    before, path = hash_student(checkpoint), checkpoint / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    tensors["filler"], tensors["model.embed_tokens.weight"] = np.zeros(3), np.zeros((8, 8), np.float32)
    names = sorted(tensors)
    for number, part in enumerate((names[:4], names[4:])):
        save_file({name: tensors[name] for name in part}, checkpoint / f"model-{number}.safetensors")
    assert hash_student(checkpoint) == before
    for name in [name for name in names[4:] if "swiftkv" in name]:
        changed = {kept: tensors[kept] for kept in names[4:]} | {name: tensors[name] + 1}
        save_file(changed, checkpoint / "model-1.safetensors")
        assert hash_student(checkpoint) != before, name


def test_only_files_that_are_loaded_count(checkpoint):
    before = hash_student(checkpoint)
    (checkpoint / "._model.safetensors").write_bytes(b"what a desktop leaves")
    assert hash_student(checkpoint) == before
    names = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"model.norm_swiftkv.weight": np.zeros(8, np.float32)}, checkpoint / "stale.safetensors")
    assert hash_student(checkpoint) == before


@pytest.mark.parametrize("kept", [4, 40, -3])
def test_a_damaged_file_is_told(checkpoint, kept):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="safetensors that cannot be read"):
        hash_student(checkpoint)


def test_a_verdict_on_another_student_is_refused(registry, make_checkpoint):
    measured, other = make_checkpoint("measured"), make_checkpoint("other", seed=1)
    provenance = Provenance(evaluation={"gate": GATE, "student_sha256": hash_student(measured)})
    with pytest.raises(CheckpointError, match="the gate's verdict in the provenance is of another student"):
        registry.publish(other, "tiny", provenance=provenance)
    with pytest.raises(CheckpointError, match="student_sha256 is None"):
        registry.publish(measured, "tiny", provenance=Provenance(evaluation={"gate": GATE}))
    assert registry.list_models() == []
    registry.publish(measured, "tiny", provenance=provenance)
    registry.publish(other, "tiny", provenance=Provenance(evaluation={"kl_nats": 0.5}))
    registry.promote("tiny@1", "production")
