"""What a Serve config says is kept on a cluster: deployed again after a failure or a loss, and only then."""

from typing import Any

import pytest

from swiftkv.cluster import RemoteCluster
from swiftkv.errors import ClusterError, ConfigError
from swiftkv.serving import keeping

CLUSTER = RemoteCluster(dashboard_url="http://192.0.2.1:8265")
CONFIG: dict[str, Any] = {"applications": [{"name": "pair"}, {"name": "gateway"}]}


class Enough(Exception):
    """Ends what would go on for ever."""


class Stage:
    """A cluster that answers as it is told, and what was done to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outcomes: list[Exception | None] = []
        """Of each deployment; the script ends where they do."""
        self.seen: list[list[str] | Exception] = []
        """Applications at each look; afterwards they are all there."""
        self.reports: list[str] = []
        self.waits: list[float] = []
        monkeypatch.setattr(keeping, "deploy_config", self.deploy)
        monkeypatch.setattr(keeping, "connect", lambda cluster: self)

    def deploy(self, cluster: RemoteCluster, config: dict[str, Any], report: Any) -> str:
        if not self.outcomes:
            raise Enough
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return "http://0.0.0.0:8000/v1"

    def get_serve_details(self) -> dict[str, Any]:
        found = self.seen.pop(0) if self.seen else []
        if isinstance(found, Exception):
            raise found
        return {"applications": dict.fromkeys(found)}

    def run(self, read: Any = lambda: CONFIG) -> None:
        with pytest.raises(Enough):
            keeping.keep_deployed(CLUSTER, read, self.reports.append, self.waits.append)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_lost_applications_are_deployed_again(stage: Stage) -> None:
    stage.outcomes = [None, None]
    stage.seen = [["pair", "gateway"], ["pair", "gateway", "more"], ["pair"], []]
    stage.run()
    assert stage.reports.count("serving pair, gateway at http://0.0.0.0:8000/v1") == 2
    assert stage.waits == [keeping.WATCH_S] * 4


def test_cluster_that_is_away_for_a_moment_has_lost_nothing(stage: Stage) -> None:
    stage.outcomes = [None]
    everything = ["pair", "gateway"]
    stage.seen = [everything, ClusterError("away"), ConnectionError("away"), RuntimeError("away"), everything, []]
    stage.run()
    assert len(stage.waits) == 6


@pytest.mark.parametrize("error", [ClusterError("away"), ConfigError("no such model"), RuntimeError("500"), OSError()])
def test_what_fails_is_tried_again_and_told_once(stage: Stage, error: Exception) -> None:
    stage.outcomes = [error, error, error, None]
    stage.run()
    assert stage.waits[:3] == [keeping.RETRY_S] * 3
    assert sum(report.startswith("error: ") for report in stage.reports) == 1


def test_another_reason_is_told_too(stage: Stage) -> None:
    stage.outcomes = [ConfigError("no workers yet"), ConfigError("no such model"), ConfigError("no such model")]
    stage.run()
    assert [report.splitlines()[0] for report in stage.reports] == ["error: no workers yet", "error: no such model"]


def test_config_is_read_at_each_try(stage: Stage) -> None:
    configs = iter([ConfigError("not YAML"), CONFIG])

    def read() -> dict[str, Any]:
        found = next(configs)
        if isinstance(found, Exception):
            raise found
        return found

    stage.outcomes = [None]
    with pytest.raises((Enough, StopIteration, RuntimeError)):
        keeping.keep_deployed(CLUSTER, read, stage.reports.append, stage.waits.append)
    assert stage.reports[0].startswith("error: not YAML")
    assert any(report.startswith("serving pair, gateway") for report in stage.reports)
