"""A pair and its policy in a Serve config: how little must be written, and what is refused with what would work."""

import json
from pathlib import Path

import pytest
import yaml
from fakes import TinyShape, write_student

from swiftkv.config import parse_settings
from swiftkv.errors import ConfigError
from swiftkv.serving.checks import check_config
from swiftkv.serving.config import PairSettings
from swiftkv.serving.hardware import CPU, GPU_BYTES, count_kv_tokens
from swiftkv.serving.pair_policy import RATES, build_policy_settings
from swiftkv.serving.policy_check import POLICY
from swiftkv.spec import SwiftKVSpec

SHIPPED = Path(__file__).parents[3] / "deployments" / "serve" / "pools-autoscaled-laptop.yaml"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("models") / "tiny", TinyShape(), 2, 2)


@pytest.fixture
def config(student):
    """The shipped one, with a model that is here."""
    config = yaml.safe_load(SHIPPED.read_text())
    config["applications"][0]["args"]["model"] = str(student)
    assert config["applications"][0]["autoscaling_policy"]["policy_kwargs"]["pair"]["model"] == str(student)
    return json.loads(json.dumps(config))  # as Serve gets it: two mappings where the file has one


def test_the_shipped_config_is_taken_and_needs_no_more_than_targets(config):
    check_config(config, "test")
    pair = parse_settings(config["applications"][0]["args"], PairSettings, "test")
    built = build_policy_settings(pair, {"targets": {"ttft_s": 1, "tpot_s": 0.1}}, "test")
    assert (built.prefill.min_replicas, built.prefill.max_replicas, built.drain) == (1, 2, "waits")


def test_costs_follow_from_the_models_spec_and_its_hardware(student):
    shape = json.loads((student / "config.json").read_text())
    spec = SwiftKVSpec.from_hf_config(shape)
    pool = {"hardware": "H100", "max_replicas": 4, "engine": {"kv_cache_gib": 40, "tensor_parallel_size": 2}}
    pair = parse_settings({"model": str(student), "prefill": pool, "decode": pool}, PairSettings, "test")
    built = build_policy_settings(pair, {"targets": {"ttft_s": 1, "tpot_s": 0.1}}, "test")
    flops = spec.compute_prompt_token_flops(1000).total
    assert built.costs.prefill_s(1000) == pytest.approx(1000 * flops / (2 * 0.5 * 989e12))
    assert built.costs.step_s == pytest.approx(spec.compute_weight_bytes() / (2 * 0.7 * 3.35e12))
    assert built.costs.kv_tokens == pytest.approx(count_kv_tokens(shape, pair.decode.engine, "H100"))
    assert built.decode.devices_per_replica == 2
    own = {"prefill_s_per_token": 1e-4, "step_s": 0.01, "kv_tokens": 1000}
    given = build_policy_settings(pair, {"targets": {"ttft_s": 1, "tpot_s": 0.1}, "costs": own}, "test")
    assert given.costs.step_s == 0.01


def test_rates_are_known_for_all_hardware_whose_memory_is():
    assert set(RATES) == {CPU, *GPU_BYTES}


def pair_of(entry):
    return entry["autoscaling_policy"]["policy_kwargs"]["pair"]


def settings_of(entry):
    return entry["autoscaling_policy"]["policy_kwargs"]["settings"]


def fix_sizes(entry):
    for pair in (entry["args"], pair_of(entry)):
        for pool in ("prefill", "decode"):
            pair[pool]["max_replicas"] = 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: entry.pop("autoscaling_policy"), f"prefill has 1 to 2 replicas.*no policy chooses.*{POLICY}"),
        (fix_sizes, "nothing to choose"),
        (
            lambda entry: pair_of(entry)["decode"].update(max_replicas=3),
            r"otherwise than args in decode.*`args: &pair`",
        ),
        (
            lambda entry: settings_of(entry).update(prefill={"max_replicas": 3}),
            "settings.prefill.max_replicas is 3, and the pool's own settings say 2",
        ),
        (
            lambda entry: settings_of(entry).update(targets={"ttft_s": 1, "tpot_s": 1e-6}),
            r"targets.tpot_s .*cannot be met.*set tpot_s to ",
        ),
        (lambda entry: settings_of(entry).pop("targets"), "targets: missing"),
        (lambda entry: settings_of(entry).update(target={}), "target: unknown key"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(config, change, said):
    change(config["applications"][0])
    with pytest.raises(ConfigError, match=f"(?s)test: application quickstart.*{said}"):
        check_config(config, "test")


def test_hardware_of_unknown_rates_needs_costs(student):
    pool = {"hardware": "V100", "max_replicas": 2, "engine": {"kv_cache_gib": 4}}
    pair = parse_settings({"model": str(student), "prefill": pool, "decode": pool}, PairSettings, "test")
    with pytest.raises(ConfigError, match="V100, whose rates are unknown; give .*costs, or one of cpu, H100"):
        build_policy_settings(pair, {"targets": {"ttft_s": 1, "tpot_s": 0.1}}, "test")
