"""Settings of pools: what is refused, what an endpoint's address is, and what a Serve config file may say."""

import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from swiftkv.config import parse_settings
from swiftkv.errors import ConfigError
from swiftkv.serving.checks import check_applications
from swiftkv.serving.config import PairSettings, PoolSettings, ServeSettings
from swiftkv.serving.deploy import build_serve_config

CONFIG_FILES = sorted((Path(__file__).parents[3] / "deployments" / "serve").glob("*.yaml"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_ongoing_requests": 4, "engine": {"max_num_seqs": 8}}, "max_ongoing_requests"),
        ({"engine": {"kv_cache_gib": 0}}, "kv_cache_gib"),
        ({"engine": {"dtype": "int4"}}, "bfloat16"),
        ({"num_replica": 2}, "num_replicas"),
        ({"model_id": "a b"}, "model_id"),
        ({"model": ""}, "model"),
    ],
)
def test_wrong_setting_is_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        parse_settings({"model": "tiny"} | wrong, PoolSettings, "test")


def test_endpoint_is_on_loopback_unless_said_otherwise():
    assert ServeSettings(model="tiny", port=8123).base_url == "http://127.0.0.1:8123/v1"


def test_pool_of_an_endpoint_keeps_every_setting_but_the_endpoint_s():
    settings = ServeSettings(model="tiny", port=8123, engine={"max_num_seqs": 4})
    assert settings.pool() == PoolSettings(model="tiny", engine={"max_num_seqs": 4})


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_config_file_is_what_serve_and_the_builder_accept(path):
    config = yaml.safe_load(path.read_text())
    ServeDeploySchema.model_validate(config)
    assert config["http_options"]["host"] == "127.0.0.1"
    check_applications(config["applications"], path.name)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_what_a_config_file_shows_in_comments_is_accepted_too(path):
    text = re.sub(r"^( *)# (prices|usage_store): ", r"\1\2: ", path.read_text(), flags=re.MULTILINE)
    check_applications(yaml.safe_load(text)["applications"], path.name)


def test_application_without_a_name_is_refused():
    applications = yaml.safe_load(CONFIG_FILES[0].read_text())["applications"]
    del applications[0]["name"]
    with pytest.raises(ConfigError, match="needs a name"):
        check_applications(applications, "test")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prefill": {"engine": {"kv_cache_dtype": "fp8"}}}, "kv_cache_dtype"),
        ({"prefill": {"engine": {"role": "full", "kv_transfer": "producer"}}}, "leave them out"),
        ({"decode": {"min_replicas": 0}}, "nobody would take the KV"),
        ({"hop": {"timeout_s": 0}}, "timeout_s"),
    ],
)
def test_pools_that_cannot_work_together_are_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        parse_settings({"model": "tiny"} | wrong, PairSettings, "test")


def test_deploying_from_code_says_what_the_config_file_says():
    path = next(path for path in CONFIG_FILES if path.name == "one-pool-laptop.yaml")
    in_file = yaml.safe_load(path.read_text())
    endpoint = in_file["http_options"]
    arguments = in_file["applications"][0]["args"]
    sent = build_serve_config(ServeSettings(**arguments, **endpoint))
    assert PoolSettings(**sent["applications"][0].pop("args")) == PoolSettings(**in_file["applications"][0].pop("args"))
    assert sent == in_file
