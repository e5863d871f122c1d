"""Serve configs that cannot work: each is refused with its reason and the nearest that works.

The likeliest ones, with the whole of what `swiftkv serve` says, are in tests/unit/test_wrong_configurations.py.
"""

import copy
import json

import pytest
from fakes import TinyShape, write_student

from swiftkv.errors import ConfigError
from swiftkv.registry.manifest import Provenance
from swiftkv.registry.registry import Registry
from swiftkv.serving.checks import check_applications, check_config, check_placement
from swiftkv.serving.config import PairSettings

SOURCE = "pools.yaml"
SHAPE = TinyShape(max_position_embeddings=2304)
H100_NODE = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A registry with tiny@1, which is `production`."""
    folder = tmp_path_factory.mktemp("store")
    registry = Registry(folder)
    registry.publish(write_student(folder.parent / "tiny", SHAPE, 2, 2), "tiny", provenance=Provenance())
    registry.set_alias("tiny", "production", "1")
    return folder


@pytest.fixture
def config(store):
    """One that works."""
    pair = {"model": "tiny@production", "store": str(store), "prefill": {}, "decode": {}}
    gateway = {"models": {"tiny": {"routes": [{"application": "tiny"}]}}}
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "tiny",
                "route_prefix": None,
                "import_path": "swiftkv.serving.app:build_pair_version",
                "args": pair,
            },
            {"name": "gateway", "import_path": "swiftkv.serving.gateway.app:build_gateway_app", "args": gateway},
        ],
    }


def change(config, path, value):
    """The config with another value at a dotted path, from the pair's arguments where it begins with `pair.`."""
    changed = copy.deepcopy(config)
    *parents, last = path.replace("pair.", "applications.0.args.").split(".")
    place = changed
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[last] = value
    return changed


def test_a_config_that_works_is_taken(config):
    check_config(config, SOURCE)


REFUSED = {
    "a version that does not exist": ({"pair.model": "tiny@7"}, "no version or alias '7'.*Versions: 1"),
    "a folder that is no checkpoint": ({"pair.model": "./nowhere"}, "no checkpoint folder"),
    "other types of KV": ({"pair.prefill": {"engine": {"kv_cache_dtype": "fp8"}}}, "kv_cache_dtype.*both the same"),
    "blocks of which none divides the other": (
        {"pair.prefill": {"engine": {"block_size": 96}}, "pair.decode": {"engine": {"block_size": 128}}},
        "block_size is 96, which does not divide decode.engine.block_size, 128.*nearest that works is 32 in prefill",
    ),
    "a larger block on the side that sends": (
        {"pair.prefill": {"engine": {"block_size": 256}}},
        "block_size is 256, which does not divide decode.engine.block_size, 128.*128 in both",
    ),
    "a prefill engine that takes less": (
        {"pair.prefill": {"engine": {"max_model_len": 1024}}, "pair.decode": {"engine": {"max_model_len": 2048}}},
        "max_model_len is 1024.*decode.engine.max_model_len is 2048.*give both 2048",
    ),
    "a prefill engine that may take less": (
        {"pair.prefill": {"engine": {"max_model_len": 1024}}},
        "max_model_len is 1024.*what the model and its KV cache allow.*give both 1024",
    ),
    "CPUs with a GPU's setting": (
        {"pair.decode": {"engine": {"gpu_memory_utilization": 0.9}}},
        "has no gpu_memory_utilization; give engine.kv_cache_gib",
    ),
    "GPUs without the size of their KV cache": (
        {"pair.decode": {"hardware": "H100", "engine": {}}, "pair.prefill": {"hardware": "H100", "engine": {}}},
        "hardware is H100: give engine.gpu_memory_utilization",
    ),
    "one pool on CPUs": (
        {"pair.decode": {"hardware": "H100", "engine": {"gpu_memory_utilization": 0.9}}},
        "one pool is on CPUs and the other on GPUs",
    ),
    "two sizes of the KV cache": (
        {"pair.decode": {"engine": {"gpu_memory_utilization": 0.9, "kv_cache_gib": 1}}},
        "kv_cache_gib and gpu_memory_utilization both say how large",
    ),
    "an application twice": ({"applications.1.name": "tiny"}, "two applications are named tiny"),
    "usage where no folder can be": (
        {"applications.1.args.usage_store": f"{__file__}/usage"},
        "usage_store: .*cannot write usage/check-.*may be written to, or leave usage_store out",
    ),
    "usage in a store of no kind": (
        {"applications.1.args.usage_store": "ftp://host/usage"},
        "usage_store: Store 'ftp://host/usage': unknown scheme 'ftp'",
    ),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_with_the_nearest_that_does(config, changes, said):
    for path, value in changes.items():
        config = change(config, path, value)
    with pytest.raises(ConfigError, match=said) as caught:
        check_config(config, SOURCE)
    assert str(caught.value).startswith(SOURCE)


def test_a_store_of_usage_that_can_be_written_is_taken_and_left_as_it_was(config, tmp_path):
    check_config(change(config, "applications.1.args.usage_store", str(tmp_path / "usage")), SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_usage_that_does_not_answer_is_refused(config, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("swiftkv.registry.storage._RETRIES", {"max_retries": 0})
    with pytest.raises(ConfigError, match="application gateway: usage_store: s3://usage: cannot write"):
        check_config(change(config, "applications.1.args.usage_store", "s3://usage"), SOURCE)


def test_a_gpu_s_name_is_one_of_ray_s(config):
    engine = {"gpu_memory_utilization": 0.9}
    for pool in ("prefill", "decode"):
        config = change(config, f"pair.{pool}", {"hardware": "H10", "engine": engine})
    with pytest.raises(ConfigError, match="hardware is 'H10', which Ray has no name for. Nearest: H[12]00"):
        check_config(config, SOURCE)


def test_weights_that_no_gpu_holds_are_refused_with_the_devices_that_do(tmp_path, config):
    shape = TinyShape(8192, 28672, 80, 64, 8, 128, 128256)
    values = {"architectures": ["LlamaSwiftKVForCausalLM"], "num_key_value_layers": 40, **vars(shape)}
    for name in ("num_experts", "num_experts_per_tok"):
        values.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").touch()
    engine = {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 2}
    config = change(config, "pair.model", str(tmp_path))
    for pool in ("prefill", "decode"):
        config = change(config, f"pair.{pool}", {"hardware": "H100", "engine": engine})
    with pytest.raises(ConfigError, match="decode: weights take 70.6 GB of each H100.*tensor_parallel_size 4"):
        check_config(config, SOURCE)


def test_pools_larger_than_the_cluster_are_refused(config):
    config = change(config, "pair.decode", {"min_replicas": 3, "max_replicas": 3})
    applications = check_applications(config["applications"], SOURCE)
    said = r"tiny, decode 3 x \(1 CPUs\)\. There: 1 x \(2 CPUs\)\. .* tiny, decode with decode.min_replicas 1"
    with pytest.raises(ConfigError, match=said):
        check_placement(applications, [{"CPU": 2.0}], SOURCE)
    check_placement(applications, [{"CPU": 4.0}], SOURCE)


def test_a_pool_that_starts_at_zero_must_still_have_a_place():
    gpus = {"hardware": "H100", "engine": {"gpu_memory_utilization": 0.9}, "min_replicas": 0}
    applications = {"tiny": PairSettings(model="tiny", prefill=gpus, decode=gpus)}
    check_placement(applications, [H100_NODE], SOURCE)
    with pytest.raises(ConfigError, match="tiny, prefill 1 x .*nodes have H100 GPUs"):
        check_placement(applications, [{"CPU": 64.0}], SOURCE)
