"""A docker/.env that cannot work is refused, each fault with what to change; the one that `make env` writes is not.

The likeliest faults, with the whole of their messages, are in tests/unit/test_wrong_configurations.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from swiftkv.serving.gateway.tenants import TenantDirectory

DOCKER = Path(__file__).parents[2] / "docker"


def change(folder: Path, **settings: str | None) -> Path:
    """The folder's .env with other values; None takes the line out."""
    path = folder / ".env"
    lines = path.read_text().splitlines()
    for name, value in settings.items():
        assert any(line.startswith(f"{name}=") for line in lines), name
        lines = [line for line in lines if not line.startswith(f"{name}=")]
        lines += [] if value is None else [f"{name}={value}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_make_env_writes_is_well(check, filled: Path) -> None:
    assert check.find_faults(filled / ".env") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"RAY_TOKEN_FILE": None}, r"RAY_TOKEN_FILE is missing\. Add it.*RAY_TOKEN_FILE=\./secrets/ray_token"),
        ({"RAY_TOKEN_FILE": ""}, "RAY_TOKEN_FILE is empty"),
        ({"RAY_TOKEN_FILE": "./secrets/other"}, r"RAY_TOKEN_FILE is .*other, and there is no such file; make env"),
        ({"SWIFTKV_PORT": "eight"}, "SWIFTKV_PORT is 'eight'; give a port's number, from 1 to 65535"),
        ({"SWIFTKV_PORT": "80000"}, "SWIFTKV_PORT is '80000'; give a port's number"),
        ({"COMPOSE_PROFILES": "tpu"}, "COMPOSE_PROFILES is 'tpu'; choose one of: cpu, gpu"),
        ({"COMPOSE_PROFILES": "cpu,gpu"}, "COMPOSE_PROFILES is 'cpu,gpu'; choose one of"),
        (
            {"COMPOSE_PROFILES": "gpu", "SWIFTKV_IMAGE": "swiftkv-serve:0.1.0-cuda"},
            "SWIFTKV_GPUS is '' and the profile is gpu; say how many GPUs",
        ),
        ({"COMPOSE_PROFILES": "gpu", "SWIFTKV_GPUS": "all"}, "SWIFTKV_GPUS is 'all' and the profile is gpu"),
        ({"SWIFTKV_GPUS": "2"}, "SWIFTKV_GPUS is 2 and the profile is cpu, which uses none"),
        ({"SWIFTKV_TENANTS_FOLDER": "./nobody"}, "SWIFTKV_TENANTS_FOLDER is ./nobody, and has no tenants.yaml"),
        (
            {"SWIFTKV_SERVE_CONFIG": "./serve/tpu.yaml"},
            "SWIFTKV_SERVE_CONFIG is ./serve/tpu.yaml, and there is no such",
        ),
        ({"SWIFTKV_WORKERS": "0"}, "SWIFTKV_WORKERS is '0'; give a whole number from 1 on"),
        ({"STORE_IMAGE": "chrislusf/seaweedfs"}, "STORE_IMAGE is chrislusf/seaweedfs, which names no version"),
        ({"PROMETHEUS_RETENTION": "two weeks"}, "PROMETHEUS_RETENTION is 'two weeks'; give a time"),
    ],
)
def test_wrong_setting_is_refused_with_what_to_change(check, filled: Path, settings, said) -> None:
    faults = check.find_faults(change(filled, **settings))
    assert any(re.search(said, fault) for fault in faults), faults


def test_each_wrong_setting_alone_gives_one_fault(check, filled: Path) -> None:
    assert len(check.find_faults(change(filled, SWIFTKV_PORT="eight"))) == 1
    assert len(check.find_faults(change(filled, COMPOSE_PROFILES="tpu"))) == 2


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_shipped_serve_config_is_one_for_this_stack(check, filled: Path, name: str) -> None:
    assert check.check_serve_config(name, filled / "serve" / name) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("http_options: {host: '0.0.0.0', port: 8000}\ntenants_file: /etc/swiftkv/tenants/tenants.yaml", []),
        ("http_options: {host: 0.0.0.0, port: 80001}\ntenants_file: /etc/swiftkv/tenants/tenants.yaml", ["port: 8000"]),
        ("host: 0.0.0.0 # x\nport: 8000\n# tenants_file: /etc/swiftkv/tenants/tenants.yaml", ["tenants_file: "]),
    ],
)
def test_serve_config_that_nobody_or_everybody_reaches_is_refused(check, tmp_path: Path, text, missing) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    faults = check.check_serve_config("serve.yaml", tmp_path / "serve.yaml")
    assert len(faults) == len(missing) and all(each in faults[0] for each in missing)


def test_digest_and_registry_with_a_port_are_versions(check, filled: Path) -> None:
    digest = "prom/prometheus@sha256:" + "0" * 64
    settings = {"PROMETHEUS_IMAGE": digest, "STORE_IMAGE": "registry.example:5000/seaweedfs:4.47"}
    assert check.find_faults(change(filled, **settings)) == []
    faults = check.find_faults(change(filled, STORE_IMAGE="registry.example:5000/seaweedfs"))
    assert len(faults) == 1 and "names no version" in faults[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has 0 characters"),
        ("two words of which neither is a token", "has more than one word"),
    ],
)
def test_wrong_token_is_refused_without_being_shown(check, filled: Path, text, said) -> None:
    (filled / "secrets" / "ray_token").write_text(text)
    (fault,) = check.find_faults(filled / ".env")
    assert said in fault
    assert not text or text not in fault


def test_store_that_does_not_know_the_keys_is_refused_unless_it_is_another(check, filled: Path) -> None:
    (filled / "secrets" / "s3_secret_key").write_text("0123456789abcdef")
    (fault,) = check.find_faults(filled / ".env")
    assert "it has not the keys of S3_ACCESS_KEY_FILE and S3_SECRET_KEY_FILE" in fault
    assert check.find_faults(change(filled, SWIFTKV_S3_ENDPOINT="https://s3.example")) == []


def test_program_says_all_faults_and_fails(filled: Path) -> None:
    path = change(filled, SWIFTKV_PORT="eight", COMPOSE_PROFILES="tpu")
    finished = subprocess.run([sys.executable, DOCKER / "check.py", path], capture_output=True, text=True)
    assert finished.returncode == 1
    assert "SWIFTKV_PORT" in finished.stderr and "COMPOSE_PROFILES" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_without_a_file_make_env_is_named(check, tmp_path: Path) -> None:
    (fault,) = check.find_faults(tmp_path / ".env")
    assert "make env" in fault


# What `make env` writes.


def test_secrets_are_random_and_closed_to_others(prepare, filled: Path, tmp_path_factory) -> None:
    secrets = {path.name: path.read_text() for path in (filled / "secrets").iterdir()}
    assert len(secrets) == 5 and len(set(secrets.values())) == 5
    assert (filled / "secrets").stat().st_mode & 0o777 == 0o700
    other = tmp_path_factory.mktemp("other")
    (other / ".env.example").write_text((filled / ".env.example").read_text())
    prepare.prepare(other)
    assert not {path.read_text() for path in (other / "secrets").iterdir()} & set(secrets.values())


def test_what_is_there_stays(prepare, filled: Path, capsys) -> None:
    before = {path: path.read_text() for path in filled.rglob("*") if path.is_file()}
    capsys.readouterr()
    prepare.prepare(filled)
    assert {path: path.read_text() for path in filled.rglob("*") if path.is_file()} == before
    assert "wrote" not in capsys.readouterr().out


def test_key_that_is_shown_is_the_tenant_s(prepare, tmp_path: Path, capsys) -> None:
    prepare.write_tenants(tmp_path)
    key = capsys.readouterr().out.split()[-1]
    assert key not in (tmp_path / "tenants.yaml").read_text()
    assert TenantDirectory(str(tmp_path / "tenants.yaml")).find(f"Bearer {key}").name == "first"
    assert len(yaml.safe_load((tmp_path / "tenants.yaml").read_text())["tenants"]) == 1


def test_digest_of_the_base_image_is_filled_in_where_there_is_docker(prepare, filled, monkeypatch, tmp_path) -> None:
    digest = "sha256:" + "ab" * 32
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\n[ "$4" = debian:bookworm-slim ] && echo {digest}\n')
    docker.chmod(0o755)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: str(docker))
    assert prepare.find_digest() == digest
    text = prepare.fill_in(filled / ".env.example", digest)
    assert f"SWIFTKV_BASE_IMAGE=debian:bookworm-slim@{digest}\n" in text
    docker.write_text("#!/bin/sh\necho no such registry >&2\nexit 1\n")
    assert prepare.find_digest() is None
