"""What a file with a rollout may say, and what of it is kept when it is deployed again."""

from pathlib import Path

import pytest
import yaml

from swiftkv.errors import ConfigError
from swiftkv.serving.checks import check_applications
from swiftkv.serving.config import PairSettings
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.rollout.record import Record
from swiftkv.serving.rollout.serve_config import build_entries, keep_versions, list_entries, read_gateway, read_record
from swiftkv.serving.rollout.settings import RolloutSettings

FILE = Path(__file__).parents[4] / "deployments" / "serve" / "rollout-laptop.yaml"


@pytest.fixture
def entries():
    return yaml.safe_load(FILE.read_text())["applications"]


def test_shipped_file_is_right_and_the_version_it_starts_is_checked_too(entries):
    found = check_applications(entries, "file")
    assert isinstance(found["rollout"], RolloutSettings)
    assert isinstance(found["quickstart@production"], PairSettings)
    assert found["quickstart@production"].model_id == "quickstart"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rollout, gateway: rollout.update(model_id="tiny"), "no gateway of this file with a model tiny"),
        (
            lambda rollout, gateway: rollout["version"].update(import_path="swiftkv.serving.app:build_pool"),
            "version.import_path is swiftkv.serving.app:build_pool, which is not there. Nearest: swiftkv.",
        ),
        (lambda rollout, gateway: rollout["version"]["args"].update(prefil={}), "version:\n  prefil: unknown key"),
        (lambda rollout, gateway: gateway["models"].update(other={}), "other has no routes, and no rollout"),
    ],
)
def test_file_that_cannot_work_is_refused_with_what_is_wrong(entries, change, said):
    change(*(entry["args"] for entry in entries))
    with pytest.raises(ConfigError) as raised:
        check_applications(entries, "file")
    assert said in str(raised.value)


def describe(entries):
    return {"applications": {entry["name"]: {"status": "RUNNING", "deployed_app_config": entry} for entry in entries}}


def test_deploying_a_file_again_keeps_what_its_rollout_has_running(entries):
    settings = check_applications(entries, "file")["rollout"]
    record = Record(stable="3", candidate="4", share=0.1)
    running = build_entries(entries, settings, "rollout", record, ["3", "4"])
    entries[1]["args"]["limits"] = {"max_sequences": 7}
    kept = keep_versions(entries, describe(running), {"rollout": settings})
    assert [entry["name"] for entry in kept] == ["rollout", "gateway", "quickstart@3", "quickstart@4"]
    assert read_record(kept, "rollout") == record
    gateway = read_gateway(kept, settings)
    assert gateway.limits.max_sequences == 7
    assert [route.application for route in gateway.models["quickstart"].routes] == ["quickstart@3", "quickstart@4"]
    assert kept[2:] == running[2:]


def test_first_deployment_is_the_file_itself(entries):
    settings = check_applications(entries, "file")["rollout"]
    assert keep_versions(entries, {"applications": {}}, {"rollout": settings}) == entries
    assert list_entries({"applications": {"x": {"status": "DELETING"}}}) == []


def test_gateway_with_no_routes_for_a_model_is_valid():
    assert GatewaySettings.model_validate({"models": {"a": {}}}).models["a"].routes == []
