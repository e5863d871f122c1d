"""Aliases: what rollbacks lead back to, the chain, promotion through a gate, watching."""

import json

import pytest

from swiftkv.errors import IntegrityError, RegistryError, VersionNotFoundError
from swiftkv.registry.evaluations import GateResult, LimitResult
from swiftkv.registry.manifest import Provenance
from swiftkv.registry.measured import hash_student


@pytest.fixture
def versions(registry, checkpoint):
    for _ in range(4):
        registry.publish(checkpoint, "tiny")
    return registry


def build_result(passed: bool) -> GateResult:
    limit = LimitResult(limit="kl_nats at most 0.05", found=0.01 if passed else 0.5, passed=passed)
    return GateResult(gate="g", sha256="0" * 64, passed=passed, limits=(limit,))


def test_rolling_back_twice_goes_two_promotions_back(versions):
    for version in "1234":
        versions.set_alias("tiny", "production", version)
    assert [versions.rollback("tiny", "production") for _ in range(2)] == ["3", "2"]
    versions.set_alias("tiny", "production", "4")
    assert versions.rollback("tiny", "production") == "2", "what was rolled back from is not gone back to"
    record = versions.load_alias("tiny", "production")
    assert [move.version for move in record.history] == ["1", "2", "3", "4", "3", "2", "4", "2"]
    assert [move.action for move in record.history].count("rollback") == 3
    assert versions.rollback("tiny", "production") == "1"
    with pytest.raises(VersionNotFoundError, match="nothing before it to go back to"):
        versions.rollback("tiny", "production")


def test_moving_to_the_same_version_is_nothing_to_go_back_to(versions):
    for version in "122":
        versions.set_alias("tiny", "production", version)
    assert versions.rollback("tiny", "production") == "1"


def test_rollback_of_what_is_not_there(versions):
    with pytest.raises(VersionNotFoundError, match="no alias 'production'"):
        versions.rollback("tiny", "production")


def test_a_history_that_is_no_chain_is_refused(versions):
    for version in "12":
        versions.set_alias("tiny", "production", version)
    path = "models/tiny/aliases/production.json"
    record = json.loads(versions._storage.read(path))
    del record["history"][0]
    versions._storage.write(path, json.dumps(record).encode())
    with pytest.raises(IntegrityError, match="history is no chain"):
        versions.resolve("tiny@production")


def test_watching_costs_one_read_and_sees_each_move(versions, monkeypatch):
    with pytest.raises(VersionNotFoundError):
        versions.watch_alias("tiny", "production")
    versions.set_alias("tiny", "production", "1")
    first = versions.watch_alias("tiny", "production")
    for other in ("read_buffer", "find_size", "list_files"):
        monkeypatch.setattr(versions._storage, other, lambda *_: pytest.fail("another request"))
    assert first.version == "1" and versions.watch_alias("tiny", "production", first.tag) is None
    monkeypatch.undo()


def test_watching_sees_a_move(versions):
    versions.set_alias("tiny", "production", "1")
    first = versions.watch_alias("tiny", "production")
    versions.set_alias("tiny", "production", "2")
    second = versions.watch_alias("tiny", "production", first.tag)
    assert second.version == "2" and versions.watch_alias("tiny", "production", second.tag) is None


def test_only_what_passed_its_newest_gate_is_promoted(versions):
    with pytest.raises(RegistryError, match="tiny@1 was put to no gate"):
        versions.promote("tiny@1", "production")
    versions.add_evaluation("tiny@1", {"kl_nats": 0.5}, build_result(False))
    with pytest.raises(RegistryError, match=r"did not pass the gate 'g': kl_nats at most 0\.05 \(found 0\.5\)"):
        versions.promote("tiny@1", "production")
    assert versions.list_aliases("tiny") == {}
    versions.add_evaluation("tiny@1", {"kl_nats": 0.01}, build_result(True))
    versions.add_evaluation("tiny@1", {"speed": 1.0})
    versions.promote("tiny@1", "production")
    versions.add_evaluation("tiny@1", {"kl_nats": 0.5}, build_result(False))
    with pytest.raises(RegistryError, match="did not pass"):
        versions.promote("tiny@1", "staging")
    versions.promote("tiny@1", "staging", forced="an outage")
    assert versions.load_alias("tiny", "staging").history[-1].forced == "an outage"
    assert versions.load_alias("tiny", "production").history[-1].forced is None


def test_a_gate_passed_before_publishing_counts(registry, checkpoint):
    for passed in (True, False):
        gate = build_result(passed).model_dump(mode="json")
        evaluation = {"kl_nats": 0.5, "student_sha256": hash_student(checkpoint), "gate": gate}
        registry.publish(checkpoint, "tiny", provenance=Provenance(evaluation=evaluation))
    registry.promote("tiny@1", "production")
    with pytest.raises(RegistryError, match="did not pass"):
        registry.promote("tiny@2", "production")


def test_an_evaluation_of_other_bytes_is_refused(versions, make_checkpoint):
    versions.publish(make_checkpoint("other", seed=1), "tiny")
    versions.add_evaluation("tiny@1", {}, build_result(True))
    folder = "models/tiny/versions/1/evaluations"
    name = next(iter(versions._storage.list_files(folder)))
    content = versions._storage.read(f"{folder}/{name}")
    versions._storage.write(f"models/tiny/versions/5/evaluations/{name}", content)
    with pytest.raises(IntegrityError, match="an evaluation of other bytes"):
        versions.promote("tiny@5", "production")


def test_gc_keeps_what_aliases_mean_and_would_roll_back_to(versions):
    for version in "312":
        versions.set_alias("tiny", "production", version)
    told = versions.collect(keep=1, dry_run=True)
    assert told.versions == ("tiny@3",) and versions.list_versions("tiny") == ["1", "2", "3", "4"]
    assert versions.collect(keep=1) == told
    assert versions.list_versions("tiny") == ["1", "2", "4"]
    assert versions.rollback("tiny", "production") == "1"


def test_a_number_never_means_two_things(registry, make_checkpoint):
    for seed in range(3):
        registry.publish(make_checkpoint(f"seed-{seed}", seed=seed), "tiny")
    registry.collect(keep=1)
    with pytest.raises(RegistryError, match=r"tiny@2 existed and was removed"):
        registry.publish(make_checkpoint("again"), "tiny", version="2")
    assert registry.publish(make_checkpoint("next", seed=9), "tiny").version == "4"
    for version in registry.list_versions("tiny"):
        registry.verify(f"tiny@{version}")


def test_gc_removes_nothing_where_a_manifest_cannot_be_read(registry, make_checkpoint):
    for seed in range(3):
        registry.publish(make_checkpoint(f"seed-{seed}", seed=seed), "tiny")
    registry._storage.write("models/tiny/versions/2/manifest.json", b"{")
    before = registry._storage.list_files("blobs").keys()
    with pytest.raises(IntegrityError, match="tiny@2"):
        registry.collect(keep=1)
    assert registry._storage.list_files("blobs").keys() == before and "1" in registry.list_versions("tiny")
