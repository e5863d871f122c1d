"""compose.yaml, without an engine: what it names exists, nothing is open to other machines, and nobody waits in vain.

The compose specification's own schema is not here; `docker compose config` would check the syntax of each key.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.serving.checks import check_applications, check_endpoint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
TEXT = "\n".join(
    line for line in (FOLDER / "compose.yaml").read_text().splitlines() if not line.strip().startswith("#")
)
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[?-])([^}]*))?\}")
FOR_BUILDING_OR_COMPOSE_ITSELF = {"SWIFTKV_BASE_IMAGE", "COMPOSE_PROFILES"}
ONE_SHOT = {"seed", "tools"}


def read_example() -> dict[str, str]:
    lines = [line for line in (FOLDER / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def interpolate(text: str, values: dict[str, str]) -> str:
    """As Compose does, for the forms that the file uses."""

    def replace(match: re.Match[str]) -> str:
        value = values.get(match[1], "")
        assert value or match[2] == ":-", f"{match[1]} has no value: {match[3]}"
        return value or match[3]

    return VARIABLE.sub(replace, text)


COMPOSE: dict[str, Any] = yaml.safe_load(interpolate(TEXT, read_example()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = ["head", "worker-cpu", "worker-gpu"]


def list_mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(volume.split(":")[:2]) for volume in service.get("volumes", [])]


# Settings.


def test_every_variable_is_in_the_example_and_the_reverse() -> None:
    used = {match[1] for match in VARIABLE.finditer(TEXT)}
    assert used == set(read_example()) - FOR_BUILDING_OR_COMPOSE_ITSELF


def test_every_variable_that_is_needed_says_what_to_do_where_it_is_missing() -> None:
    for name, form, text in (match.groups() for match in VARIABLE.finditer(TEXT)):
        if name == "SWIFTKV_GPUS":  # of one profile only; check.py asks for it there
            continue
        assert form == ":?" and text, f"{name} has a default, or no message"


def test_every_setting_of_the_example_is_explained() -> None:
    explained = False
    for line in (FOLDER / ".env.example").read_text().splitlines():
        if line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        else:
            assert explained, f"{line}: no comment above it"


def test_check_knows_the_same_settings(check) -> None:
    known = {*check.PORTS, *check.IMAGES, *check.SIZES, *check.SECRETS, *check.OPTIONAL}
    assert known <= set(read_example())
    assert {name for name in read_example() if name.endswith("_PORT")} == set(check.PORTS)
    assert {name for name in read_example() if name.endswith("_IMAGE")} == {*check.IMAGES, "SWIFTKV_BASE_IMAGE"}


def test_no_secret_is_in_the_files() -> None:
    for name, value in read_example().items():
        if re.search("TOKEN|PASSWORD|SECRET|KEY", name):
            assert value.startswith("./secrets/"), name
    for name, service in SERVICES.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search("TOKEN|PASSWORD|SECRET|ACCESS_KEY", variable):
                assert str(value).startswith("/run/secrets/"), f"{name}: {variable}"


# What it names exists.


def test_every_image_has_a_version() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].rpartition("/")[2].partition(":")[2]
        assert tag and tag != "latest", name


def test_our_images_are_never_taken_from_a_registry() -> None:
    ours = [service for service in SERVICES.values() if service["image"].startswith("swiftkv-")]
    assert len(ours) == 6
    assert {service["pull_policy"] for service in ours} == {"never"}


def test_every_mounted_file_exists(filled: Path) -> None:
    """Secrets and tenants are what `make env` writes."""
    for name, service in SERVICES.items():
        for source, target in list_mounts(service):
            assert target.startswith("/"), name
            if not source.startswith("."):
                assert source in COMPOSE["volumes"], f"{name}: {source} is no volume of the file"
                continue
            made = source.startswith(("./tenants", "./secrets"))
            assert ((filled if made else FOLDER) / source).exists(), f"{name}: {source}"
    for secret in COMPOSE["secrets"].values():
        assert (filled / secret["file"]).is_file()


def test_files_are_mounted_read_only() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            assert not volume.startswith(".") or volume.endswith(":ro"), f"{name}: {volume}"


def test_everything_declared_is_used_and_the_reverse() -> None:
    mounted = {source for service in SERVICES.values() for source, _ in list_mounts(service) if source[0] not in "./"}
    assert mounted == set(COMPOSE["volumes"])
    assert {name for service in SERVICES.values() for name in service.get("secrets", [])} == set(COMPOSE["secrets"])
    assert {name for service in SERVICES.values() for name in service["networks"]} == set(COMPOSE["networks"])


@pytest.mark.parametrize("service", [n for n, s in SERVICES.items() if (s.get("command") or [""])[0] == "swiftkv"])
def test_our_commands_exist(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swiftkv.cli.node._become", print)
    monkeypatch.setattr("swiftkv.cli.node.build_head", lambda *given: f"head {given[1:]}")
    monkeypatch.setattr("swiftkv.cli.node.build_worker", lambda *given: f"worker {given[1:]}")
    monkeypatch.setattr("swiftkv.serving.keeping.keep_deployed", lambda cluster, *_: print(cluster.dashboard_url))
    finished = CliRunner().invoke(app, SERVICES[service]["command"][1:])
    assert finished.exit_code == 0, finished.output
    said = {"head": "head (0, 200000000", "worker-cpu": "worker ('head', 1,", "worker-gpu": "worker ('head', None,"}
    assert said.get(service, "http://head:8265" if service == "endpoint" else "Usage") in finished.output


# Nothing is open.


def test_ports_are_published_on_loopback_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"head", "store", "prometheus", "grafana"}
    for name, ports in published.items():
        for port in ports:
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name}: {port}"


def test_of_ray_only_endpoint_and_dashboard_are_published() -> None:
    assert [port.rpartition(":")[2] for port in SERVICES["head"]["ports"]] == ["8000", "8265"]


@pytest.mark.parametrize("service", SERVICES)
def test_container_has_no_power_over_the_machine(service: str) -> None:
    settings = SERVICES[service]
    powers = {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices", "user", "extra_hosts"}
    assert not settings.keys() & powers
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert not any("docker.sock" in volume for volume in settings.get("volumes", []))


@pytest.mark.parametrize("service", NODES)
def test_ray_nodes_have_the_token_and_bounds(service: str) -> None:
    settings = SERVICES[service]
    assert "ray_token" in settings["secrets"]
    assert settings["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert settings["mem_limit"] and settings["shm_size"]
    assert settings["cap_drop"] == ["ALL"]
    assert settings["networks"] == ["cluster"], "a node's address is that of its host's name, which must be one"


def test_grafana_asks_for_a_password_and_reaches_prometheus_only() -> None:
    settings = SERVICES["grafana"]
    assert settings["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert settings["networks"] == ["boards"]
    assert [name for name, service in SERVICES.items() if "boards" in service["networks"]] == ["prometheus", "grafana"]


# Nobody waits in vain.


def test_every_service_that_stays_has_a_health_check_and_comes_back() -> None:
    for name, service in SERVICES.items():
        assert ("healthcheck" in service) is (name not in ONE_SHOT), name
        assert (service.get("restart") == "unless-stopped") is (name not in ONE_SHOT), name
        if "healthcheck" in service:
            assert service["healthcheck"]["test"][0] == "CMD"


def test_services_wait_for_what_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}"
            else:
                assert wait["condition"] == "service_completed_successfully" and other in ONE_SHOT
            # A service of another profile is not started, and whoever needs it is refused.
            assert not SERVICES[other].get("profiles"), f"{name} waits for {other}, which is of a profile"


def test_profiles_are_those_of_the_check(check) -> None:
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    assert profiles == {*check.PROFILES, "tools"}


# The files of the services.


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_serve_config_is_what_serve_and_the_builders_accept(name: str, tmp_path: Path, filled: Path) -> None:
    config = yaml.safe_load((FOLDER / "serve" / f"{name}.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    *_, gateway = config["applications"]
    assert ("./tenants", "/etc/swiftkv/tenants") in list_mounts(SERVICES["head"])
    assert gateway["args"]["tenants_file"] == "/etc/swiftkv/tenants/tenants.yaml"
    gateway["args"]["tenants_file"] = str(filled / "tenants" / "tenants.yaml")
    applications = check_applications(config["applications"], name)
    check_endpoint(config, applications, name)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    stores = {entry["args"].get("store") for entry in config["applications"][:-1]}
    assert stores == {SERVICES["seed"]["command"][-1]}


def test_serve_config_fits_the_workers_of_the_example() -> None:
    config = yaml.safe_load((FOLDER / "serve" / "cpu.yaml").read_text())
    pair = config["applications"][0]["args"]
    example = read_example()
    assert pair["prefill"]["num_cpus"] + pair["decode"]["num_cpus"] <= int(example["SWIFTKV_WORKERS"]) * int(
        example["SWIFTKV_WORKER_CPUS"]
    )


def test_prometheus_finds_its_rules_the_head_and_the_token() -> None:
    config = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text())
    targets = {target for _, target in list_mounts(SERVICES["prometheus"])}
    assert {f"/etc/prometheus/{name}" for name in config["rule_files"]} <= targets
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    assert discovery["url"].startswith("http://head:8265/")
    secret = Path(discovery["authorization"]["credentials_file"]).name
    assert secret in SERVICES["prometheus"]["secrets"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="on Debian: apt install prometheus")
def test_prometheus_takes_its_config(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "prometheus" / "prometheus.yml", tmp_path)
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(ROOT / "dashboards" / "prometheus" / name, tmp_path)
    command = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_grafana_finds_the_boards_and_prometheus() -> None:
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards" / "swiftkv.yaml").read_text())["providers"]
    mounts = {target: source for source, target in list_mounts(SERVICES["grafana"])}
    boards = FOLDER / mounts[provider["options"]["path"]]
    assert len(list(boards.glob("*.json"))) >= 6
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (boards / Path(home).relative_to(provider["options"]["path"])).is_file()
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]


# `make up`.


@pytest.fixture
def up(filled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """Runs docker/up.sh of the filled folder beside a docker that writes down what it is asked."""
    for name in ("up.sh", "check.py"):
        shutil.copy(FOLDER / name, filled)
    programs = tmp_path_factory.mktemp("bin")
    docker = programs / "docker"
    monkeypatch.setenv("PATH", f"{programs}:/usr/local/bin:/usr/bin:/bin")

    def run(image_is_there: bool = True, health: str = "healthy") -> tuple[int, str, str]:
        asked = programs / "asked"
        docker.write_text(
            f'#!/bin/sh\necho "$*" >>{asked}\n'
            f'case "$1 $2" in "image inspect") exit {0 if image_is_there else 1} ;;\n'
            f'"inspect --format") echo {health} ;; esac\n'
        )
        docker.chmod(0o755)
        finished = subprocess.run([filled / "up.sh"], capture_output=True, text=True, timeout=60)
        return finished.returncode, finished.stdout + finished.stderr, asked.read_text() if asked.exists() else ""

    return run


def test_up_starts_the_stack_and_says_where_it_is(up) -> None:
    status, said, asked = up()
    assert status == 0, said
    assert "compose up --detach" in asked
    assert "http://127.0.0.1:8000/v1" in said and "Grafana http://127.0.0.1:3000" in said


def test_up_starts_nothing_with_a_wrong_env(up, filled: Path) -> None:
    path = filled / ".env"
    path.write_text(path.read_text().replace("SWIFTKV_PORT=8000", "SWIFTKV_PORT=eight"))
    status, said, asked = up()
    assert status != 0 and "give a port's number" in said
    assert asked == ""


def test_up_without_the_image_says_how_to_build_it(up) -> None:
    status, said, asked = up(image_is_there=False)
    assert status != 0 and "make images" in said
    assert "compose" not in asked
