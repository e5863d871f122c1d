"""The Kubernetes manifests, as far as a machine without a cluster can tell."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import kustomize
import pytest
import yaml
from manifests import SECRETS, find_faults, get_cluster, list_nodes, list_pods

from swiftkv.cluster import haproxy, lifecycle
from swiftkv.config import parse_settings
from swiftkv.distill.recipe import Recipe, load_recipe
from swiftkv.errors import ConfigError
from swiftkv.serving.checks import check_model, check_placement
from swiftkv.serving.config import PairSettings
from swiftkv.serving.policy_check import check_policy

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deployments" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
SERVING = ["cluster", "laptop", "one-node-8xh100", "two-gpu-types"]
TRAINING = ["distill-8xh100", "standing-8xh100"]

_spec = importlib.util.spec_from_file_location("write_manifests", FOLDER / "write.py")
write = importlib.util.module_from_spec(_spec)  # dashboards/write.py has its name too
_spec.loader.exec_module(write)


@pytest.fixture(scope="module")
def built():
    """The objects of each overlay, by its name."""
    return {name: kustomize.build(FOLDER / "overlays" / name) for name in OVERLAYS}


def find(objects, kind, name=None):
    """The object of a kind, and of a name where there are several."""
    (found,) = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return found


def read_serve_config(objects):
    return yaml.safe_load(find(objects, "RayService")["spec"]["serveConfigV2"])


def test_each_way_of_serving_and_of_training_is_there():
    assert sorted(SERVING + TRAINING) == OVERLAYS
    assert sorted(write.SERVED) == SERVING


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_no_fault(built, overlay):
    assert find_faults(built[overlay]) == []


def test_the_ingress_finds_the_gateway(built):
    assert find_faults([*built["cluster"], *kustomize.build(FOLDER / "ingress")]) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_builds_the_same(built, overlay):
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not here")
    version = subprocess.run([kubectl, "version", "--client", "--output=json"], capture_output=True, text=True)
    if not json.loads(version.stdout).get("kustomizeVersion", "").startswith("v5."):
        pytest.skip("kubectl's kustomize is older than 5")
    command = [kubectl, "kustomize", str(FOLDER / "overlays" / overlay)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    def order(objects):
        return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert order(yaml.safe_load_all(run.stdout)) == order(built[overlay])


# What repeats other files.


def test_the_files_are_what_the_code_makes():
    assert write.find_stale_files() == []


@pytest.mark.parametrize("overlay", SERVING)
def test_the_serve_config_is_the_file_s_but_for_what_pods_need(built, overlay):
    expected = yaml.safe_load((ROOT / "deployments" / "serve" / write.SERVED[overlay]).read_text())
    served = read_serve_config(built[overlay])
    pair = served["applications"][0]["args"]
    expected |= {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0", "port": 8000}}
    expected["applications"][0]["args"] |= {"store": pair["store"]} if "store" in pair else {}
    expected["applications"][1]["args"]["tenants_file"] = "/etc/swiftkv/tenants.yaml"
    assert served == expected
    assert ("store" in pair) is (overlay != "laptop")


def test_a_bucket_that_was_filled_in_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "FOLDER", tmp_path)
    patch = tmp_path / "overlays" / "cluster" / "serve.yaml"
    patch.parent.mkdir(parents=True)
    patch.write_text(write.build_serve_patch("cluster"))
    assert patch.read_text().count(write.NO_BUCKET) == 1
    patch.write_text(patch.read_text().replace(write.NO_BUCKET, "s3://models/registry"))
    assert write.build_serve_patch("cluster") == patch.read_text()


@pytest.mark.parametrize("overlay", ["cluster", "one-node-8xh100", "two-gpu-types"])
def test_boards_and_rules_are_those_of_dashboards(built, overlay):
    boards = find(built[overlay], "ConfigMap", "swiftkv-dashboards")
    assert boards["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert boards["data"] == {path.name: path.read_text() for path in (ROOT / "dashboards" / "grafana").iterdir()}
    assert all(json.loads(board)["uid"] for board in boards["data"].values())
    groups = []
    for name in ("recording.yml", "alerts.yml"):
        groups += yaml.safe_load((ROOT / "dashboards" / "prometheus" / name).read_text())["groups"]
    assert find(built[overlay], "PrometheusRule")["spec"]["groups"] == groups


def test_the_environment_is_that_of_our_own_cluster(built, tmp_path):
    """But for ports and files, which a pod has to itself, and for loopback."""
    shared = find(built["cluster"], "ConfigMap", "swiftkv-environment")["data"]
    serve = find(built["cluster"], "ConfigMap", "swiftkv-serve-environment")["data"]
    own = lifecycle._head_environment(tmp_path, list(range(20000, 20013)), tls=None)
    switches = {name: value for name, value in own.items() if name.startswith("RAY_SERVE_")}
    of_a_pod = {name for name in switches if name.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE"))}
    assert {name: value for name, value in switches.items() if name not in of_a_pod} == {
        name: value for name, value in serve.items() if name not in of_a_pod
    }
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_num_workers_soft_limit", "PYTHONUNBUFFERED"):
        assert shared[name] == own[name]
    assert not set(lifecycle._LOOPBACK_ONLY) & (set(shared) | set(serve))


def test_haproxy_is_started_and_answers_as_in_our_own_cluster(built, tmp_path):
    files = find(built["cluster"], "ConfigMap", "swiftkv-haproxy")["data"]
    assert files["unavailable.http"].encode() == haproxy._build_unavailable()
    unavailable = "/etc/swiftkv-haproxy/unavailable.http"
    own = haproxy._START_SCRIPT.format(binary="", unavailable=unavailable, tls="", bind="").splitlines()
    assert files["haproxy.sh"].splitlines()[: len(own) - 1] == own[:-1]
    # It does what it says to a configuration of Ray's, and leaves the gateway's own address.
    config = tmp_path / "haproxy.cfg"
    config.write_text("  bind *:8404\n    bind :9101\n    bind 0.0.0.0:8000\n    errorfile 503 /tmp/500.http\n")
    python = '#!/bin/sh\necho "${RAY_SERVE_HAPROXY_BINARY_PATH:-echo}"\n'  # the package, whose program is echo
    for name, text in {"haproxy.sh": files["haproxy.sh"], "python": python}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = subprocess.run(
        [tmp_path / "haproxy.sh", "-db", "-f", config],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_SERVE_HAPROXY_BINARY_PATH": "haproxy.sh"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"-db -f {config}\n", run.stderr
    assert config.read_text() == (
        "  bind 127.0.0.1:8404\n    bind 127.0.0.1:9101\n    bind 0.0.0.0:8000\n"
        "    errorfile 503 /etc/swiftkv-haproxy/unavailable.http\n"
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_knows_what_it_is_started_with(built, overlay):
    from ray.scripts.scripts import start

    options = {name.removeprefix("--") for parameter in start.params for name in parameter.opts}
    cluster = next(get_cluster(each) for each in built[overlay] if get_cluster(each))
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert set(group["rayStartParams"]) <= options


# Sizes.


LLAMA = {
    "architectures": ["LlamaSwiftKVForCausalLM"],
    "model_type": "llama_swiftkv",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_key_value_layers": 16,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "key_value_group_size": 1,
    "swiftkv": True,
}


@pytest.mark.parametrize(
    ("overlay", "ways"),
    [
        ("one-node-8xh100", [(2, 6), (5, 3)]),
        ("cluster", [(2, 6), (3, 5), (4, 4), (5, 3)]),
        ("two-gpu-types", [(16, 8)]),
    ],
)
def test_the_pods_hold_what_the_policy_may_want_and_no_more(built, overlay, ways):
    service = find(built[overlay], "RayService")
    settings = read_serve_config(built[overlay])["applications"][0]["args"]
    pair = parse_settings(settings, PairSettings, overlay)
    for prefill, decode in ways:
        sized = {
            kind: getattr(pair, kind).model_copy(update={"min_replicas": count})
            for kind, count in (("prefill", prefill), ("decode", decode))
        }
        check_placement({"pair": pair.model_copy(update=sized)}, list_nodes(service), overlay)
        sized["decode"] = sized["decode"].model_copy(update={"min_replicas": decode + 1})
        with pytest.raises(ConfigError, match="do not fit the cluster"):
            check_placement({"pair": pair.model_copy(update=sized)}, list_nodes(service), overlay)


def test_pools_on_two_kinds_of_gpus_work_and_stay_apart(built, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").touch()
    application = read_serve_config(built["two-gpu-types"])["applications"][0]
    local = {"model": str(tmp_path), "model_id": "llama-3.1-8b-swiftkv"}
    pair = parse_settings(application["args"] | local, PairSettings, "two-gpu-types")
    check_model(pair, "two-gpu-types")
    given = application["autoscaling_policy"]["policy_kwargs"]
    assert given["pair"] == application["args"]
    check_policy(
        application["autoscaling_policy"] | {"policy_kwargs": given | {"pair": pair.model_dump()}},
        pair,
        "two-gpu-types",
    )
    groups = {
        pod.labels["ray.io/group"]: pod.spec["nodeSelector"]["nvidia.com/gpu.product"]
        for pod in list_pods(find(built["two-gpu-types"], "RayService"))[1:]
    }
    assert groups == {"prefill": "NVIDIA-L40S", "decode": "NVIDIA-H100-80GB-HBM3"}
    assert (pair.prefill.hardware, pair.decode.hardware) == ("L40S", "H100")


def test_the_job_s_recipe_is_there_and_its_workers_fit_the_pod(built):
    job = find(built["distill-8xh100"], "RayJob")
    recipes = find(built["distill-8xh100"], "ConfigMap", "swiftkv-jobs")["data"]
    assert recipes == {
        path.name: path.read_text() for path in [ROOT / "jobs" / "distill.py", *(ROOT / "jobs" / "recipes").iterdir()]
    }
    (name,) = re.findall(r"distill\.py (\S+\.yaml)", job["spec"]["entrypoint"])
    recipe = load_recipe(ROOT / "jobs" / "recipes" / name, {})
    assert isinstance(recipe, Recipe) and name in recipes
    node = list_nodes(job)[0]
    workers = recipe.workers
    assert workers.num_workers == node["GPU"]
    assert workers.num_workers * workers.cpus_per_worker + job["spec"]["entrypointNumCpus"] <= node["CPU"]
    folders = set(re.findall(r"\$SWIFTKV_HOME/runs/[^\"/ ]+", job["spec"]["entrypoint"]))
    assert len(folders) == 1, "a second try goes on where the first one was"


def test_the_job_s_shell_begins_and_goes_on(built, tmp_path):
    entrypoint = find(built["distill-8xh100"], "RayJob")["spec"]["entrypoint"].replace(
        "/etc/swiftkv-jobs", str(tmp_path)
    )
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)

    def run():
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SWIFTKV_HOME": str(tmp_path)}
        return subprocess.run(["/bin/sh", "-c", entrypoint], env=environment, capture_output=True, text=True).stdout

    folder = tmp_path / "runs" / "llama-3.1-8b-half"
    assert run() == f"distill.py llama-3.1-8b-half-8xh100.yaml --output {folder}\n"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    assert run() == f"distill.py --resume {folder}\n"


# Secrets.


def test_readme_says_how_each_secret_is_made(built):
    readme = (FOLDER / "README.md").read_text()
    for name, keys in SECRETS.items():
        assert name in readme
        assert all(key in readme for key in keys)
    named = json.dumps([*built.values(), kustomize.build(FOLDER / "ingress")])
    assert all(f'"{name}"' in named for name in SECRETS)


def test_no_secret_is_in_a_manifest(built):
    for objects in built.values():
        assert not [each for each in objects if each["kind"] == "Secret"]
        assert "password" not in {key.lower() for each in objects for key in each.get("data", {})}
