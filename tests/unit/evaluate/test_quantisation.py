"""The line that tells two checkpoints' quantisations apart: different numbers differ, everything else does not."""

import itertools

import pytest

from swiftkv.evaluate.quantisation import describe_quantisation

INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False}


def describe(**settings):
    return describe_quantisation({"quantization_config": settings})


def build_groups(*groups, **others):
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named} | others


DIFFERENT = [
    build_groups({"weights": INT8, "input_activations": INT8}),
    build_groups({"weights": INT8, "input_activations": None}),
    build_groups({"weights": INT8 | {"num_bits": 4}}),
    build_groups({"weights": INT8 | {"strategy": "tensor"}}),
    build_groups({"weights": INT8}, {"weights": INT8 | {"num_bits": 4}}),
    build_groups({"weights": INT8}, kv_cache_scheme={"num_bits": 8, "type": "float"}),
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "fp8", "activation_scheme": "static"},
    {"quant_method": "fp8", "activation_scheme": "dynamic"},
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"},
]


def test_other_numbers_are_other_lines():
    assert len({describe(**settings) for settings in DIFFERENT} | {describe_quantisation({})}) == len(DIFFERENT) + 1


def test_none_is_none():
    assert describe_quantisation({}) == describe_quantisation({"quantization_config": {}}) == "none"


@pytest.mark.parametrize("settings", DIFFERENT, ids=str)
def test_layers_left_out_and_versions_do_not_matter(settings):
    assert describe(**settings, ignore=["lm_head"], version="0.9") == describe(**settings)


def test_names_and_order_of_groups_do_not_matter():
    groups = [{"weights": INT8, "targets": ["Linear"]}, {"weights": INT8 | {"num_bits": 4}}]
    assert len({describe(**build_groups(*order)) for order in itertools.permutations(groups)}) == 1
