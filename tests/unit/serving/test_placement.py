"""Which pools fit which nodes, and what is said of those that do not."""

import pytest

from swiftkv.serving.placement import Demand, describe_nodes, find_nearest, fits

H100_NODE = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
LAPTOP = {"CPU": 2.0}


def build_demand(name, replicas, num_gpus=0, num_cpus=1.0, hardware="H100"):
    return Demand(name, f"{name}.min_replicas", replicas, hardware if num_gpus else "cpu", num_cpus, num_gpus)


@pytest.mark.parametrize(
    ("demands", "nodes", "expected"),
    [
        ([build_demand("prefill", 1), build_demand("decode", 1)], [LAPTOP], True),
        ([build_demand("prefill", 1), build_demand("decode", 2)], [LAPTOP], False),
        ([build_demand("prefill", 4, num_cpus=0.5)], [LAPTOP], True),
        ([build_demand("prefill", 4, 4), build_demand("decode", 4, 4)], [H100_NODE] * 4, True),
        ([build_demand("prefill", 5, 4), build_demand("decode", 4, 4)], [H100_NODE] * 4, False),
        # 6 of 8 GPUs leave 2 on each node: a replica is never cut over two.
        ([build_demand("decode", 2, 6), build_demand("prefill", 1, 4)], [H100_NODE] * 2, False),
        # The larger ones first, or the small ones would take a GPU of each node.
        ([build_demand("prefill", 8, 1), build_demand("decode", 1, 8)], [H100_NODE] * 2, True),
        ([build_demand("decode", 1, 1, hardware="H200")], [H100_NODE], False),
        ([build_demand("decode", 1, 1)], [H100_NODE | {"CPU": 0.5}], False),
        ([], [], True),
    ],
)
def test_replicas_fit_where_each_finds_a_node(demands, nodes, expected):
    assert fits(demands, nodes) is expected


@pytest.mark.parametrize(
    ("demands", "nodes", "said"),
    [
        ([build_demand("prefill", 1), build_demand("decode", 3)], [LAPTOP], "decode with decode.min_replicas 1"),
        (
            [build_demand("prefill", 5, 4), build_demand("decode", 4, 4)],
            [H100_NODE] * 4,
            "prefill with prefill.min_replicas 4",
        ),
        ([build_demand("decode", 1, 16)], [H100_NODE] * 2, "decode with engine.tensor_parallel_size 8"),
        ([build_demand("decode", 1, 1, hardware="H200")], [H100_NODE], "nodes have H200 GPUs"),
        ([build_demand(name, 1) for name in ("a", "b", "c", "d")], [LAPTOP], "num_cpus 0.5 in every pool"),
        ([build_demand("a", 1, 5), build_demand("b", 1, 5)], [H100_NODE], "more nodes"),
    ],
)
def test_the_nearest_that_fits_is_named(demands, nodes, said):
    assert not fits(demands, nodes)
    assert said in find_nearest(demands, nodes)


def test_nodes_are_told_with_equal_ones_together():
    assert describe_nodes([H100_NODE, LAPTOP, H100_NODE]) == "2 x (64 CPUs and 8 H100), 1 x (2 CPUs)"
