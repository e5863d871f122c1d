"""The shipped configs for GPUs, as far as a machine without one can tell: what they become, and whether it fits."""

import json
from pathlib import Path

import pytest
import yaml

from swiftkv.config import parse_settings
from swiftkv.engine.settings import ROLE_KEY, EngineSettings
from swiftkv.errors import ConfigError
from swiftkv.serving.checks import check_model, check_placement, list_pools
from swiftkv.serving.config import PairSettings, PoolSettings
from swiftkv.serving.hardware import (
    GPU_BYTES,
    build_bundles,
    compute_device_weight_bytes,
    compute_kv_cache_bytes,
    compute_kv_token_bytes,
    count_kv_tokens,
)
from swiftkv.serving.policy_check import check_policy
from swiftkv.serving.pools import configure_pair, configure_pool
from swiftkv.spec import SwiftKVSpec

FOLDER = Path(__file__).parents[3] / "deployments" / "serve"
GIB = 2**30

LLAMA = {
    "architectures": ["LlamaSwiftKVForCausalLM"],
    "model_type": "llama_swiftkv",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "key_value_group_size": 1,
    "swiftkv": True,
}
SIZES = {
    "llama-3.1-8b-8xh100.yaml": (4096, 14336, 32, 32),
    "llama-3.3-70b-4nodes.yaml": (8192, 28672, 80, 64),
}
NODES = {"llama-3.1-8b-8xh100.yaml": 1, "llama-3.3-70b-4nodes.yaml": 4}
NODE = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


@pytest.fixture(params=SIZES, ids=lambda name: name.removesuffix(".yaml"))
def shipped(request, tmp_path):
    """Name, applications as the file has them, and the pair with a model of that shape in a local folder."""
    hidden, intermediate, layers, heads = SIZES[request.param]
    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_layers": layers // 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | shape))
    (tmp_path / "model.safetensors").touch()
    applications = yaml.safe_load((FOLDER / request.param).read_text())["applications"]
    arguments = applications[0]["args"]
    local = {"model": str(tmp_path), "model_id": arguments["model"].partition("@")[0]}
    return request.param, applications, parse_settings(arguments | local, PairSettings, request.param)


def test_clients_name_the_model_as_its_version_does(shipped):
    """vLLM refuses other names than its own."""
    _, applications, pair = shipped
    assert list(applications[1]["args"]["models"]) == [pair.model_id]


def test_every_way_to_share_the_gpus_fits_the_nodes(shipped):
    """As many replicas of each pool as there are GPUs for, and no policy may want more."""
    name, applications, pair = shipped
    policy = applications[0]["autoscaling_policy"]
    settings, num_gpus = policy["policy_kwargs"]["settings"], 8 * NODES[name]
    assert policy["policy_kwargs"]["pair"] == applications[0]["args"]
    assert settings["device_budget"] == num_gpus
    check_policy(policy | {"policy_kwargs": {"pair": pair.model_dump(), "settings": settings}}, pair, name)
    devices = pair.prefill.engine.tensor_parallel_size
    ways = [
        (prefill, num_gpus // devices - prefill)
        for prefill in range(pair.prefill.min_replicas, pair.prefill.max_replicas + 1)
        if pair.decode.min_replicas <= num_gpus // devices - prefill <= pair.decode.max_replicas
    ]
    assert len(ways) == 4
    for prefill, decode in ways:
        sizes = {"prefill": {"min_replicas": prefill}, "decode": {"min_replicas": decode}}
        sized = {kind: getattr(pair, kind).model_copy(update=size) for kind, size in sizes.items()}
        check_placement({"pair": pair.model_copy(update=sized)}, [NODE] * NODES[name], name)
        sized["decode"] = sized["decode"].model_copy(update={"min_replicas": decode + 1})
        with pytest.raises(ConfigError, match="do not fit the cluster"):
            check_placement({"pair": pair.model_copy(update=sized)}, [NODE] * NODES[name], name)


def test_weights_and_the_longest_prompt_fit_each_gpu(shipped):
    name, _, pair = shipped
    check_model(pair, name)
    shape = json.loads((Path(pair.model) / "config.json").read_text())
    spec = SwiftKVSpec.from_hf_config(shape)
    for pool in list_pools({"pair": pair}):
        devices = pool.engine.tensor_parallel_size
        weights = spec.compute_weight_bytes() if "decode" in pool.place else spec.compute_prefill_weight_bytes()
        prompt = pool.engine.max_model_len * spec.compute_kv_bytes_per_token()
        assert (weights + prompt) / devices < 0.9 * GPU_BYTES["H100"]


def read_llm_configs(pair):
    """What Ray Serve LLM is told of the prefill and the decode deployment."""
    return dict(zip(("prefill", "decode"), configure_pair(pair), strict=True))


def test_ray_is_asked_for_gpus_of_one_node(shipped):
    _, _, pair = shipped
    for role, config in read_llm_configs(pair).items():
        pool = getattr(pair, role)
        devices = pool.engine.tensor_parallel_size
        assert (config.accelerator_type, config.accelerator_config.kind) == ("H100", "gpu")
        engine = config.get_engine_config()
        assert (engine.placement_strategy, engine.num_devices) == ("STRICT_PACK", devices)
        bundles = engine.placement_bundles
        assert [bundle["GPU"] for bundle in bundles] == [1] * devices
        assert all(bundle["accelerator_type:H100"] == 0.001 for bundle in bundles)
        assert sum(bundle.get("CPU", 0) for bundle in bundles) == pool.num_cpus
        # A CPU's settings would bind every replica of a node to the same cores.
        assert not [name for name in config.runtime_env["env_vars"] if "OMP" in name or "CPU" in name]


def test_vllm_takes_the_engines_arguments(shipped):
    """With its CPU build, which knows every argument and no GPU: up to its own whole config of the engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _, _, pair = shipped
    for role, config in read_llm_configs(pair).items():
        arguments = config.get_engine_config().engine_kwargs
        built = AsyncEngineArgs(model=pair.model, skip_tokenizer_init=True, **arguments).create_engine_config()
        engine = getattr(pair, role).engine
        assert built.parallel_config.tensor_parallel_size == engine.tensor_parallel_size
        assert built.cache_config.gpu_memory_utilization == 0.9
        assert built.cache_config.kv_cache_memory_bytes is None
        assert built.model_config.max_model_len == 131072
        assert built.additional_config.get(ROLE_KEY, "full") == ("prefill" if role == "prefill" else "full")
        assert built.kv_transfer_config.is_kv_producer is (role == "prefill")
        assert built.scheduler_config.max_num_batched_tokens == engine.max_num_batched_tokens


def test_one_pool_can_be_on_gpus_too():
    engine = {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 2}
    config = configure_pool(PoolSettings(model="/models/tiny", model_id="tiny", hardware="L40S", engine=engine))
    assert config.engine_kwargs["gpu_memory_utilization"] == 0.9
    assert "kv_cache_memory_bytes" not in config.engine_kwargs
    assert config.get_engine_config().placement_bundles == [
        {"CPU": 1, "GPU": 1, "accelerator_type:L40S": 0.001},
        {"GPU": 1, "accelerator_type:L40S": 0.001},
    ]


def test_a_replica_on_cpus_is_one_bundle():
    assert build_bundles("cpu", 0.5, 2) == [{"CPU": 0.5}]


SHAPE = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_layers": 16,
}


@pytest.mark.parametrize(
    ("engine", "token_bytes"),
    [
        ({}, 32 * 2 * 8 * 128 * 2),
        ({"dtype": "float32"}, 32 * 2 * 8 * 128 * 4),
        ({"kv_cache_dtype": "fp8"}, 32 * 2 * 8 * 128),
        ({"tensor_parallel_size": 4}, 32 * 2 * 2 * 128 * 2),
        # More devices than KV heads: two hold the same one.
        ({"tensor_parallel_size": 16}, 32 * 2 * 1 * 128 * 2),
    ],
)
def test_bytes_of_a_token_s_kv_on_each_device(engine, token_bytes):
    assert compute_kv_token_bytes(SHAPE, EngineSettings(**engine)) == token_bytes


def test_weights_of_each_role_counted_by_hand():
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    vocab, key_value = 128256 * 4096, 2 * 4096 * 1024
    half = vocab + 16 * layer + 4096 + 16 * key_value
    whole = 2 * vocab + 32 * layer + 2 * 4096
    assert compute_device_weight_bytes(SHAPE, EngineSettings(role="prefill")) == 2 * half
    assert compute_device_weight_bytes(SHAPE, EngineSettings(tensor_parallel_size=4)) == 2 * whole / 4


def test_kv_cache_is_what_is_set_or_what_a_gpu_has_left():
    assert count_kv_tokens(SHAPE, EngineSettings(kv_cache_gib=2), "cpu") == 2 * GIB / (32 * 2 * 8 * 128 * 2)
    shared = EngineSettings(gpu_memory_utilization=0.9)
    left = 0.9 * GPU_BYTES["H100"] - compute_device_weight_bytes(SHAPE, shared)
    assert 0 < compute_kv_cache_bytes(SHAPE, shared, "H100") < left
    assert count_kv_tokens(SHAPE, shared, "H20") is None
    assert count_kv_tokens(SHAPE, EngineSettings(gpu_memory_utilization=0.1), "H100") == 0
