"""What may not be published, and what someone else's tools wrote and must be published as it is."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from swiftkv.errors import CheckpointError
from swiftkv.registry.checks import check_checkpoint

ALLOWED = ("llama_swiftkv",)


def test_spec_is_read_from_the_config(checkpoint):
    spec = check_checkpoint(checkpoint, ALLOWED)
    assert spec["architecture"] == "LlamaSwiftKVForCausalLM"
    assert (spec["num_hidden_layers"], spec["num_key_value_layers"], spec["key_value_group_size"]) == (6, 2, 2)
    assert spec["quantization"] is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "b.pth", "c.ckpt", "d.pkl", "original/e.PTH"])
def test_pickled_files_are_refused(checkpoint, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"pickled files \\({name}\\).*safetensors.*remove"):
        check_checkpoint(checkpoint, ALLOWED)


def test_code_is_refused(checkpoint):
    (checkpoint / "modeling_llama_swiftkv.py").write_text("")
    with pytest.raises(CheckpointError, match=r"code \(modeling_llama_swiftkv\.py\)"):
        check_checkpoint(checkpoint, ALLOWED)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_auto_map_is_refused(checkpoint, name):
    path = checkpoint / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"auto_map": {"AutoModel": "modeling.Model"}}))
    with pytest.raises(CheckpointError, match=f"{name}: key 'auto_map'.*Remove the key"):
        check_checkpoint(checkpoint, ALLOWED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", r"no \*\.safetensors"),
    ],
)
def test_missing_file_is_named(checkpoint, name, message):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(checkpoint, ALLOWED)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        check_checkpoint(tmp_path / "nowhere", ALLOWED)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_config_that_is_no_json_object_is_refused(checkpoint, content):
    (checkpoint / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: (not JSON|expected a JSON object)"):
        check_checkpoint(checkpoint, ALLOWED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not a SwiftKV model. Allowed: llama_swiftkv"),
        ({"model_type": "qwen9_swiftkv"}, "model_type 'qwen9_swiftkv' is not"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures None"),
        ({"num_key_value_layers": None}, "lacks num_key_value_layers"),
        ({"num_key_value_layers": 7}, "num_key_value_layers is 7, but the model has 6 layers"),
        ({"key_value_group_size": 3}, "key_value_group_size is 3, which does not divide"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_layers": "many"}, "config.json: "),
    ],
)
def test_config_of_another_model_is_refused(make_checkpoint, config, message):
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(make_checkpoint(**config), ALLOWED)


def test_without_a_list_of_families_only_swiftkv_types_pass(make_checkpoint):
    check_checkpoint(make_checkpoint("a", model_type="qwen9_swiftkv"))
    with pytest.raises(CheckpointError, match="those that end in _swiftkv"):
        check_checkpoint(make_checkpoint("b", model_type="llama"))


@pytest.mark.parametrize(
    "tensor",
    [
        "model.norm_swiftkv.weight",
        "model.layers.5.self_attn.q_proj_swiftkv.weight",
        "model.layers.4.self_attn.k_proj_swiftkv.weight",
        "model.layers.2.self_attn.v_proj_swiftkv.weight",
    ],
)
def test_missing_tensor_is_named(make_checkpoint, tensor):
    folder = make_checkpoint(rename=lambda name: None if name == tensor else name)
    with pytest.raises(CheckpointError, match=f"1 SwiftKV tensors are missing: {tensor}"):
        check_checkpoint(folder, ALLOWED)


def test_group_size_one_needs_keys_and_values_in_every_later_layer(make_checkpoint):
    with pytest.raises(CheckpointError, match=r"4 SwiftKV tensors are missing: model\.layers\.3"):
        check_checkpoint(make_checkpoint(key_value_group_size=None), ALLOWED)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\x80\x04" + data, lambda data: data[:5]])
def test_weights_that_are_not_safetensors_are_refused(checkpoint, damage):
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        check_checkpoint(checkpoint, ALLOWED)


def split_into_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_checkpoint_passes(checkpoint):
    split_into_shards(checkpoint)
    check_checkpoint(checkpoint, ALLOWED)


def test_index_that_names_a_missing_shard_is_refused(checkpoint):
    split_into_shards(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which the folder lacks"):
        check_checkpoint(checkpoint, ALLOWED)


def test_index_of_another_save_is_refused(checkpoint):
    split_into_shards(checkpoint)
    shards = [checkpoint / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match="in files that do not hold them"):
        check_checkpoint(checkpoint, ALLOWED)


def test_checkpoints_of_others_pass(make_checkpoint):
    """As Snowflake publishes them: a `swiftkv` key, the teacher's dead projections; quantised, weight_scale too."""
    folder = make_checkpoint(
        swiftkv=True, rope_scaling={"rope_type": "llama3"}, quantization_config={"quant_method": "compressed-tensors"}
    )
    tensors = load_file(folder / "model.safetensors")
    scales = {f"{name}_scale": value[:1] for name, value in tensors.items() if name.endswith("proj_swiftkv.weight")}
    dead = {"model.layers.4.self_attn.k_proj.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors | scales | dead, folder / "model.safetensors")
    assert check_checkpoint(folder, ALLOWED)["quantization"] == "compressed-tensors"


def test_packed_weights_pass(make_checkpoint):
    folder = make_checkpoint(rename=lambda name: name.replace("proj_swiftkv.weight", "proj_swiftkv.weight_packed"))
    check_checkpoint(folder, ALLOWED)
