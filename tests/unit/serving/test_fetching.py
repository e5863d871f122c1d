"""A replica's node gets the model before the engine starts. A second node is another SWIFTKV_HOME here."""

import asyncio
import logging
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
from fakes import TinyShape, write_student

from swiftkv.bench.s3 import run_s3_server
from swiftkv.errors import (
    CheckpointError,
    ConfigError,
    IntegrityError,
    RegistryError,
    StoreError,
    VersionNotFoundError,
)
from swiftkv.registry.manifest import Base
from swiftkv.registry.registry import Registry
from swiftkv.serving import fetching
from swiftkv.serving.config import PairSettings, PoolSettings
from swiftkv.serving.fetching import Fetching, fetch_version, place_model
from swiftkv.serving.pools import configure_pair, configure_pool
from swiftkv.serving.source import resolve_model


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two checkpoints that differ in nothing but their weights."""
    folder = tmp_path_factory.mktemp("students")
    return [write_student(folder / f"seed{seed}", TinyShape(), 3, seed=seed) for seed in (0, 1)]


@pytest.fixture
def registry(tmp_path, students, monkeypatch):
    """tiny@1 is production, tiny@2 the other; the application is built on the node `first`."""
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "first"))
    registry = Registry(tmp_path / "store")
    for student in students:
        registry.publish(student, "tiny")
    registry.set_alias("tiny", "production", "1")
    return registry


@pytest.fixture
def second(tmp_path, monkeypatch):
    """Lets this process be on another node from now on."""
    return lambda: monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "second"))


def resolve(registry, **changes):
    return resolve_model(PoolSettings(model="tiny@production", store=registry.location, **changes))


def read_weights(folder):
    return (folder / "model.safetensors").read_bytes()


def name_model(config):
    return config.get_engine_config().get_initialization_kwargs()["model"]


def test_building_fetches_nothing_and_a_replica_fetches_to_its_own_node(registry, students, second, tmp_path):
    settings = resolve(registry)
    assert not (tmp_path / "first").exists()
    config = configure_pool(settings)
    second()
    fetched = place_model(config, settings.published)
    assert fetched.path.is_relative_to(tmp_path / "second")
    assert read_weights(fetched.path) == read_weights(students[0])
    # As Ray hands it to the task in which it looks for the model once more.
    assert name_model(pickle.loads(pickle.dumps(config))) == str(fetched.path)
    assert not (tmp_path / "first").exists()


def test_all_replicas_get_one_version_wherever_the_alias_moves(registry, students, second):
    settings = resolve(registry)
    registry.set_alias("tiny", "production", "2")
    fetched = [place_model(configure_pool(settings), settings.published)]
    second()
    fetched.append(place_model(configure_pool(settings), settings.published))
    assert [found.version for found in fetched] == ["1", "1"]
    assert {read_weights(found.path) for found in fetched} == {read_weights(students[0])}
    assert resolve_model(settings).published == settings.published, "Serve builds an application again"


def test_a_relative_store_is_the_same_for_every_process(registry, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    relative = resolve_model(PoolSettings(model="tiny@1", store="store"))
    assert relative.published.store == str(tmp_path / "store")


FETCH = """
import sys
from swiftkv.registry.storage import Storage
from swiftkv.serving.config import PublishedVersion
from swiftkv.serving.fetching import fetch_version
reads, read_buffer = [], Storage.read_buffer
Storage.read_buffer = lambda self, path: reads.append(path) or read_buffer(self, path)
print(flush=True)
sys.stdin.readline()
fetch_version(PublishedVersion.model_validate_json(sys.argv[1]), with_weights=True)
print(sum(path.startswith("blobs/") for path in reads))
"""


def test_replicas_of_one_node_download_once(registry, second):
    published = resolve(registry).published
    second()
    words = [sys.executable, "-c", FETCH, published.model_dump_json()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    replicas = [subprocess.Popen(words, **pipes) for _ in range(3)]
    for replica in replicas:
        replica.stdout.readline()
    for replica in replicas:
        replica.stdin.write("\n")
        replica.stdin.flush()
    num_reads = [int(replica.communicate(timeout=120)[0]) for replica in replicas]
    assert sorted(num_reads) == [0, 0, len(registry.load_manifest("tiny@1").stored_blobs)]


def test_a_damaged_copy_is_replaced(registry, students, second):
    published = resolve(registry).published
    second()
    damaged = fetch_version(published, with_weights=True)
    damaged.copy.release()
    weights = damaged.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert read_weights(fetch_version(published, with_weights=True).path) == read_weights(students[0])


def test_a_node_that_has_the_version_needs_no_store(registry, students, second):
    published = resolve(registry).published
    second()
    fetch_version(published, with_weights=True).copy.release()
    shutil.rmtree(registry.location)
    fetched = fetch_version(published, with_weights=True)
    assert read_weights(fetched.path) == read_weights(students[0])
    (fetched.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"(?s)node .* did not get tiny@1 .*every node must see.*nothing found"):
        fetch_version(published, with_weights=True)


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_kept_manifest_that_is_none_is_not_believed(registry, students, second, content):
    published = resolve(registry).published
    second()
    fetched = fetch_version(published, with_weights=True)
    kept = fetched.path.with_suffix(".json")
    other = registry.load_manifest("tiny@2").to_json()
    kept.write_bytes(other if content is None else content)
    assert fetch_version(published, with_weights=True).version == "1"
    assert kept.read_bytes() == fetched.manifest.to_json()


def test_a_folder_that_the_node_does_not_see_is_told(registry, second):
    published = resolve(registry).published
    shutil.rmtree(registry.location)
    second()
    with pytest.raises(
        VersionNotFoundError, match=r"node \S+ \(.+\) did not get tiny@1 of .*every node must see .*store"
    ):
        fetch_version(published, with_weights=True)


def test_a_bucket_that_the_node_does_not_reach_is_told(students, second, monkeypatch):
    with run_s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        registry = Registry(server.create_bucket("models"))
        registry.publish(students[0], "tiny")
        settings = resolve_model(PoolSettings(model="tiny", store=registry.location))
        second()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
        monkeypatch.setattr("swiftkv.registry.storage._RETRIES", {"max_retries": 0})
        with pytest.raises(StoreError, match=r"did not get tiny@1 of s3://models.*credentials and endpoint.*cannot"):
            fetch_version(settings.published, with_weights=True)


def test_another_store_of_the_same_name_is_told(registry, students, second):
    published = resolve(registry).published
    shutil.rmtree(registry.location)
    registry.publish(students[1], "tiny")
    second()
    with pytest.raises(IntegrityError, match="published anew. Deploy again"):
        fetch_version(published, with_weights=True)


def test_a_home_that_cannot_be_written_to_is_told(registry, tmp_path, second):
    published = resolve(registry).published
    (tmp_path / "second").write_text("no folder")
    second()
    with pytest.raises(RegistryError, match=r"node .* did not get tiny@1.*second"):
        fetch_version(published, with_weights=True)


def test_a_streamed_version_comes_without_its_tensors(registry, second):
    settings = resolve(registry, stream=True)
    second()
    config = configure_pool(settings)
    fetched = place_model(config, settings.published)
    assert name_model(config) == str(fetched.path)
    assert (fetched.path / "config.json").is_file() and not list(fetched.path.glob("*.safetensors"))


def test_engines_that_exchange_kv_must_have_one_path(registry, second):
    settings = resolve_model(PairSettings(model="tiny@1", store=registry.location))
    for config in configure_pair(settings):
        assert str(place_model(config, settings.published).path) == name_model(config) == settings.model
    second()
    for config in configure_pair(settings):
        with pytest.raises(ConfigError, match="give every node the same SWIFTKV_HOME"):
            place_model(config, settings.published)


def test_a_folder_is_looked_for_and_not_fetched(students, tmp_path, second):
    folder = shutil.copytree(students[0], tmp_path / "mine")
    settings = resolve_model(PoolSettings(model=str(folder)))
    config = configure_pool(settings)
    second()
    assert settings.published is None and place_model(config, None) is None
    assert name_model(config) == str(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"node .*mine is not there.*on every node.*swiftkv publish"):
        place_model(config, None)
    assert not (tmp_path / "second").exists()


def test_the_teacher_s_files_may_come_from_the_hub_only_where_the_store_lacks_them(
    registry, students, tmp_path, second
):
    teacher = shutil.copytree(students[1], tmp_path / "teacher")
    shared = {"tokenizer.json": "tokenizer.json"}
    base = Base(name=str(teacher), stored=False)
    registry.publish(students[1], "delta", base=base, base_paths=shared)
    delta = resolve_model(PoolSettings(model="delta", store=registry.location))
    assert "HF_HUB_OFFLINE" not in configure_pool(delta).runtime_env["env_vars"]
    assert configure_pool(resolve(registry)).runtime_env["env_vars"]["HF_HUB_OFFLINE"] == "1"
    second()
    fetched = fetch_version(delta.published, with_weights=True)
    assert (fetched.path / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    fetched.copy.release()
    shutil.rmtree(fetched.path)
    shutil.rmtree(teacher)
    with pytest.raises(CheckpointError, match=r"did not get delta@1.*every node needs them.*no such folder"):
        fetch_version(delta.published, with_weights=True)


def test_progress_is_logged(registry, second, caplog, monkeypatch):
    published = resolve(registry).published
    second()
    monkeypatch.setattr(fetching, "PROGRESS_PERIOD_S", 0.0)
    with caplog.at_level(logging.INFO, "ray.serve"):
        fetch_version(published, with_weights=True)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith(f"taking tiny@1 from {registry.location} into ")
    assert any("GB are here and verified" in line for line in lines)
    assert "is verified in" in lines[-1]


def test_the_server_starts_after_the_model_is_there_and_without_blocking_its_loop(monkeypatch):
    told = []

    class Server:
        async def __init__(self, llm_config, engine_cls):
            told.append(("server", llm_config, engine_cls))

    class Ours(Fetching, Server):
        pass

    def place(config, published):
        told.append(("model", config, published))
        assert threading.current_thread() is not threading.main_thread()

    monkeypatch.setattr(fetching, "place_model", place)

    async def start():
        server = Ours.__new__(Ours)
        await server.__init__("config", published="version", engine_cls="engine")

    asyncio.run(start())
    assert told == [("model", "config", "version"), ("server", "config", "engine")]
