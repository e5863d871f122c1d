"""The line that tells two checkpoints' quantisations apart, on the forms that published checkpoints have."""

import pytest

from swiftkv.evaluate.quantisation import describe_quantisation

INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
W8A8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": INT8, "input_activations": INT8}},
}
W4A16 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": INT8 | {"num_bits": 4}, "input_activations": None}},
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, "none"),
        ({}, "none"),
        (W8A8, "activations int 8, compressed-tensors, weights int 8"),
        (W4A16, "compressed-tensors, weights int 4"),
        (
            W8A8 | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            "KV cache float 8, activations int 8, compressed-tensors, weights int 8",
        ),
        ({"quant_method": "gptq", "bits": 4}, "4 bits, gptq"),
    ],
)
def test_description(settings, expected):
    assert describe_quantisation({} if settings is None else {"quantization_config": settings}) == expected


def test_layers_that_are_left_out_and_the_order_of_groups_do_not_matter():
    two = {"a": {"weights": INT8}, "b": {"weights": INT8 | {"num_bits": 4}}}
    turned = dict(reversed(two.items()))
    first, second = (
        {"quant_method": "x", "config_groups": groups, "ignore": [n]} for n, groups in ((1, two), (2, turned))
    )
    assert describe_quantisation({"quantization_config": first}) == describe_quantisation(
        {"quantization_config": second}
    )
