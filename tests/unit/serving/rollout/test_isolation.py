"""Why no KV moves between two versions. NIXL's hash covers the model's path and not its weights, so paths must differ;
and a decode pool knows one prefill pool, its own."""

import pytest
import ray
from fakes import TinyShape, write_student

from swiftkv.registry.registry import Registry
from swiftkv.serving.config import PairSettings
from swiftkv.serving.pools import build_pair
from swiftkv.serving.source import resolve_model


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """Ray starts by itself when a deployment is built; no other test may find it running."""
    yield
    ray.shutdown()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two versions that differ in nothing but their weights."""
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    registry = Registry(tmp_path / "registry")
    for seed in (0, 1):
        registry.publish(write_student(tmp_path / f"seed{seed}", TinyShape(), 3, seed=seed), "tiny")
    return str(tmp_path / "registry")


@pytest.mark.parametrize("stream", [False, True])
def test_two_versions_never_share_a_path(store, stream):
    versions = ("tiny@1", "tiny@2")
    first, second = (resolve_model(PairSettings(model=name, store=store, stream=stream)) for name in versions)
    assert first.model != second.model
    again = resolve_model(PairSettings(model="tiny@1", store=store, stream=stream))
    assert first.model == again.model


@pytest.mark.parametrize("stream", [False, True])
def test_decode_pool_is_bound_to_the_prefill_pool_of_its_own_version(store, stream):
    paths = []
    for version in ("tiny@1", "tiny@2"):
        settings = resolve_model(PairSettings(model=version, model_id="tiny", store=store, stream=stream))
        decode = build_pair(settings)[1]._bound_deployment
        prefill = decode.init_kwargs["prefill_server"]._bound_deployment
        found = {
            deployment.init_kwargs["llm_config"].model_loading_config.model_source for deployment in (decode, prefill)
        }
        assert found == {settings.model}
        paths.append(settings.model)
    assert len(set(paths)) == 2
