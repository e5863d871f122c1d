"""Each step of a rollout, with a real registry and stand-ins for Serve's config and the gateways' counts."""

import asyncio
import copy
import json
import logging

import pytest
from fakes import TinyShape, write_student

from swiftkv.errors import ConfigError, RegistryError
from swiftkv.registry.registry import Registry
from swiftkv.serving.gateway.outcomes import Compared, Outcome, VersionCounts, VersionReport, add_outcomes
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.rollout.rollout import Rollout
from swiftkv.serving.rollout.serve_config import read_record
from swiftkv.serving.rollout.settings import RolloutSettings

SETTINGS = {
    "model": "tiny",
    "share_frac": 0.25,
    "min_requests": 20,
    "min_compared": 5,
    "version": {"args": {"kv_lease_s": 9}},
}
OTHER = {"name": "other", "route_prefix": "/other", "import_path": "a:b", "args": {"x": 1}}
GATEWAY = {"models": {"tiny": {}, "big": {"routes": [{"application": "other"}]}}, "lease_s": 5}


class FakeServe:
    """Serve's config and what became of it: what is written runs at once, but for `failed`."""

    def __init__(self):
        self.entries = [
            OTHER,
            {"name": "rollout", "import_path": "c:d", "args": SETTINGS},
            {
                "name": "gateway",
                "import_path": "e:f",
                "args": GATEWAY,
                "deployments": [{"name": "gateway", "num_replicas": 2}],
            },
        ]
        self.failed = {}
        """Status and message by application."""
        self.is_building = False
        self.writes = []

    def read(self):
        details = {entry["name"]: self._describe(entry) for entry in copy.deepcopy(self.entries)}
        if self.is_building:
            details["other"] |= {"status": "DEPLOYING", "deployments": {}}
        return {"proxy_location": "HeadOnly", "http_options": {"port": 8000}, "applications": details}

    def write(self, config):
        assert config.keys() == {"proxy_location", "http_options", "applications"}
        self.entries = json.loads(json.dumps(config["applications"]))
        self.writes.append(self.entries)

    def _describe(self, entry):
        status, message = self.failed.get(entry["name"], ("RUNNING", ""))
        return {"status": status, "message": message, "deployments": {"d": {}}, "deployed_app_config": entry}

    def find(self, name):
        (entry,) = [entry for entry in self.entries if entry["name"] == name]
        return entry

    @property
    def names(self):
        return {entry["name"] for entry in self.entries} - {"other", "rollout", "gateway"}

    @property
    def record(self):
        return read_record(self.entries, "rollout")

    @property
    def routes(self):
        """Weights, as both of the gateway's deployments have them."""
        deployments = {found["name"]: found for found in self.find("gateway")["deployments"]}
        assert deployments["gateway"]["num_replicas"] == 2
        parsed = [GatewaySettings.model_validate(found["user_config"]) for found in deployments.values()]
        assert len(parsed) == 2
        assert parsed[0] == parsed[1]
        return {route.application: route.weight for route in parsed[0].models["tiny"].routes}


class World:
    """One rollout, with all that it asks."""

    def __init__(self, folder):
        self.folder = folder
        self.registry = Registry(folder / "registry")
        self.serve = FakeServe()
        self.counts = {}
        self.in_flight = {}
        self.epoch = "e"
        self.age_s = 1000.0
        self.now_s = 0.0
        self.warmed = []
        self.warm_error = None
        self.restart()

    def restart(self):
        settings = RolloutSettings.model_validate(SETTINGS)
        self.rollout = Rollout(
            settings, "rollout", self.serve, self.registry, self.report, self.warm, lambda: self.now_s
        )

    def release(self, seed=0):
        checkpoint = write_student(self.folder / f"tiny{seed}", TinyShape(), 3, seed=seed)
        version = self.registry.publish(checkpoint, "tiny").version
        self.registry.set_alias("tiny", "production", version)
        return version

    async def report(self):
        return VersionReport(self.epoch, self.age_s, dict(self.counts), dict(self.in_flight))

    async def warm(self, application):
        self.warmed.append(application)
        if self.warm_error:
            raise self.warm_error

    def advance(self, times=1, restarts=False):
        for _ in range(times):
            if restarts:
                self.restart()
            asyncio.run(self.rollout.advance())

    def settle(self, restarts=False):
        """Until nothing changes any more."""
        before = -1
        while before != len(self.serve.writes):
            before = len(self.serve.writes)
            self.advance(3, restarts)

    def answer(self, application, number, is_failed=False, is_same=True):
        outcomes = [Outcome(application, is_failed, 0.1 + 0.001 * index, 0.01) for index in range(number)]
        add_outcomes(self.counts, outcomes + [Compared(application, is_same)] * number)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    world = World(tmp_path)
    world.release()
    return world


@pytest.fixture
def second(world):
    """A world whose first version answers, and whose alias names the second."""
    world.settle()
    assert world.release(seed=1) == "2"
    return world


def read_events(caplog):
    return [json.loads(message) for name, _, message in caplog.record_tuples if name == "swiftkv.rollout"]


# From the first version to the second.


def test_first_version_gets_everything_once_it_runs_and_is_warm(world):
    world.advance()
    entry = world.serve.find("tiny@1")
    assert entry["args"] == {"kv_lease_s": 9, "model": "tiny@1", "model_id": "tiny"}
    assert entry["import_path"] == "swiftkv.serving.app:build_pair_version"
    world.serve.failed = {"tiny@1": ("DEPLOYING", "")}
    world.advance(2)
    assert (world.serve.record.stable, world.warmed) == (None, [])
    world.serve.failed = {}
    world.advance()
    assert (world.serve.routes, world.warmed) == ({"tiny@1": 1}, ["tiny@1"])
    world.settle()
    assert len(world.serve.writes) == 2
    assert world.serve.find("other") == OTHER


def test_good_version_gets_its_share_then_everything(second):
    second.advance(2)
    assert second.serve.routes == {"tiny@1": 0.75, "tiny@2": 0.25}
    assert second.warmed == ["tiny@1", "tiny@2"]
    second.answer("tiny@2", 100, is_failed=True)  # before anybody watched: of an earlier attempt
    second.advance()
    second.answer("tiny@1", 60)
    second.answer("tiny@2", 19)
    second.advance()
    assert second.serve.record.share == 0.25, "too few requests"
    second.answer("tiny@2", 1)
    second.advance()
    assert second.serve.routes == {"tiny@2": 1}
    assert second.serve.names == {"tiny@1", "tiny@2"}


def test_old_application_is_removed_when_nobody_has_held_its_requests_for_two_leases(second):
    second.advance(3)
    second.answer("tiny@2", 30)
    second.in_flight = {"tiny@1": 3}
    second.advance(2)
    second.now_s += 100
    second.advance()
    second.in_flight = {}
    second.advance()
    second.now_s += 9.9
    second.advance()
    assert second.serve.names == {"tiny@1", "tiny@2"}
    second.age_s = 9.9  # counting has begun anew: who holds what is not told yet
    second.now_s += 1
    second.advance()
    assert second.serve.names == {"tiny@1", "tiny@2"}
    second.age_s = 11
    second.advance()
    second.now_s += 10.1
    second.advance()
    assert second.serve.names == {"tiny@2"}
    second.settle()


def test_gateway_that_has_not_taken_its_routes_yet_keeps_the_old_application(second):
    second.advance(3)
    second.answer("tiny@2", 30)
    second.advance()
    second.serve.failed = {"gateway": ("DEPLOYING", "")}
    for _ in range(3):
        second.now_s += 100
        second.advance()
    assert second.serve.names == {"tiny@1", "tiny@2"}


@pytest.mark.parametrize("restarts", [False, True])
def test_replica_killed_before_every_look_comes_to_the_same_end(second, restarts):
    second.settle(restarts)
    assert second.serve.routes == {"tiny@1": 0.75, "tiny@2": 0.25}
    second.advance()
    second.answer("tiny@1", 60)
    second.answer("tiny@2", 30)
    second.settle()  # watching takes two looks of the same replica
    second.settle(restarts)
    assert second.serve.routes == {"tiny@2": 1}
    second.advance()
    second.now_s += 11
    second.settle()
    assert second.serve.names == {"tiny@2"}


# Versions that are not switched to.


@pytest.mark.parametrize(("worse", "reason"), [({"is_failed": True}, "error_rate"), ({"is_same": False}, "agreement")])
def test_bad_version_is_dropped_with_its_reason_and_not_tried_until_the_alias_moves(second, caplog, worse, reason):
    caplog.set_level(logging.INFO, "swiftkv.rollout")
    second.advance(3)
    second.answer("tiny@1", 60)
    second.answer("tiny@2", 10, **worse)
    second.advance()
    assert second.serve.routes == {"tiny@1": 1}
    assert second.serve.record.rejected.reason.startswith(f"{reason}: ")
    assert read_events(caplog)[-1]["reason"] == reason
    second.advance()
    second.now_s += 11
    second.settle()
    second.settle(restarts=True)
    assert second.serve.names == {"tiny@1"}
    second.registry.set_alias("tiny", "production", "2")  # said once more
    second.settle()
    assert second.serve.names == {"tiny@1", "tiny@2"}


def find_new_blob(folder, before):
    (blob,) = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    return blob


def test_version_with_a_damaged_file_is_not_started_and_the_stable_one_goes_on(second, caplog):
    caplog.set_level(logging.INFO, "swiftkv.rollout")
    blobs = second.folder / "registry" / "blobs"
    before = set(blobs.rglob("*"))
    assert second.release(seed=2) == "3"
    blob = find_new_blob(blobs, before)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    second.settle()
    assert (second.serve.names, second.serve.routes) == ({"tiny@1"}, {"tiny@1": 1})
    (event,) = [event for event in read_events(caplog) if event["event"] == "rejected"]
    assert (event["version"], event["reason"]) == ("3", "verify")
    assert "model.safetensors" in event["message"]


def test_version_without_a_manifest_is_not_started(second):
    (second.folder / "registry/models/tiny/versions/2/manifest.json").unlink()
    second.settle()
    assert second.serve.names == {"tiny@1"}
    assert second.serve.record.rejected.reason.startswith("verify: ")


def test_store_that_does_not_answer_rejects_nothing(second, monkeypatch):
    def refuse(*_):
        raise RegistryError("no route to the store")

    with monkeypatch.context() as patch:
        patch.setattr(second.registry, "fetch", refuse)
        with pytest.raises(RegistryError):
            second.advance()
    second.advance()
    assert second.serve.record.candidate == "2"


@pytest.mark.parametrize("status", ["DEPLOY_FAILED", "UNHEALTHY"])
def test_version_that_does_not_start_is_dropped(second, status):
    second.serve.failed = {"tiny@2": (status, "Traceback\nEngineError: no memory")}
    second.advance(2)
    assert "no memory" in second.serve.record.rejected.reason
    assert second.serve.routes == {"tiny@1": 1}


def test_version_that_starts_for_ever_is_dropped(second):
    second.serve.failed = {"tiny@2": ("DEPLOYING", "waiting for a CPU")}
    second.advance(2)
    second.now_s += 899
    second.advance()
    assert second.serve.record.candidate == "2"
    second.now_s += 2
    second.advance()
    assert "waiting for a CPU" in second.serve.record.rejected.reason


def test_version_that_fails_its_first_requests_gets_none_of_a_client(second):
    second.warm_error = ValueError("nonsense")
    second.advance(2)
    assert "warm: ValueError: nonsense" in second.serve.record.rejected.reason
    assert second.serve.routes == {"tiny@1": 1}


def test_first_version_of_all_that_is_bad_is_waited_out(world):
    world.warm_error = ValueError("nonsense")
    world.advance(2)
    world.settle()
    assert world.serve.record.rejected.version == "1"
    world.warm_error = None
    world.release(seed=1)
    world.now_s += 11
    world.advance()
    world.now_s += 11
    world.settle()
    assert world.serve.routes == {"tiny@2": 1}


# What others do meanwhile.


def test_counting_that_began_anew_is_watched_anew(second):
    second.advance(3)
    second.answer("tiny@2", 30, is_failed=True)
    second.epoch, second.counts = "f", {"tiny@2": VersionCounts()}
    second.advance(3)
    assert second.serve.record.share == 0.25


def test_routes_that_another_deployment_took_away_are_set_again(second):
    second.advance(2)
    second.serve.find("gateway")["deployments"] = [{"name": "gateway", "num_replicas": 2}]
    second.advance()
    assert second.serve.routes == {"tiny@1": 0.75, "tiny@2": 0.25}


def test_stable_application_that_is_gone_is_started_again(second):
    second.serve.entries = [entry for entry in second.serve.entries if entry["name"] != "tiny@1"]
    second.settle()
    assert (second.serve.names, second.serve.routes) == ({"tiny@2"}, {"tiny@2": 1})


def test_nothing_is_written_while_an_application_is_being_built(second):
    second.serve.is_building = True
    num_writes = len(second.serve.writes)
    second.advance(3)
    assert len(second.serve.writes) == num_writes


def test_gateway_without_the_model_is_named(second):
    second.serve.find("gateway")["args"] = {"models": {"big": {}}}
    second.serve.find("gateway")["deployments"] = []
    with pytest.raises(ConfigError, match="has no model 'tiny'"):
        second.advance()
