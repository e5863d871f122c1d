"""Promises about the repository as a whole: rooms and their imports, light modules, errors, shipped settings.

Reads sources with `ast` where importing would hide a fault, and asks fresh interpreters where importing is the
question.
"""

import ast
import builtins
import importlib.util
import os
import pickle
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from swiftkv import errors
from swiftkv.config import load_yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "platform"
PACKAGE = SOURCE / "swiftkv"
HEAVY = ("torch", "ray", "vllm")

FOR_EVERY_ROOM = {"config", "errors", "spec", "metrics"}
ANYTHING = {"*"}
MAY_IMPORT: dict[str, set[str]] = {
    # The design's table of rooms (section 4).
    "config": {"errors"},
    "errors": set(),
    "spec": {"errors"},
    "families": {"errors", "spec"},
    "model": {"families", "hf_config"},
    "distill": {"model", "registry", "text", "families", "hub"},
    "evaluate": {"model", "engine", "registry", "text", "hf_config"},
    "registry": {"spec", "hub"},
    "engine": {"families", "hf_config"},
    "serving": {"engine", "registry", "cluster"},
    "capacity": {"serving.policy"},
    "bench": ANYTHING,
    "loadgen": {"metrics"},
    "metrics": set(),
    "cli": ANYTHING,
    # Rooms of one file that several of the above share.
    "hf_config": {"families"},
    "text": set(),
    "hub": set(),
    "cluster": {"config", "errors"},
    "jobs": set(),
}
ONLY_LISTED = {"config", "errors", "spec", "metrics", "cluster"}
"""Rooms that get nothing beyond their row; the others may import FOR_EVERY_ROOM too."""

FORBIDDEN_LIBRARIES = {
    "config": HEAVY,
    "errors": HEAVY,
    "spec": HEAVY,
    "families": HEAVY,
    "model": ("vllm",),
    "engine": ("ray",),
    "registry": HEAVY,
}
"""Rooms that never import a library, not even inside a function."""


# Where things lie.


def test_platform_is_a_folder_and_no_package() -> None:
    assert not (SOURCE / "__init__.py").exists()


def test_import_platform_from_the_checkout_is_the_standard_library() -> None:
    code = "import platform, uuid; print(platform.__file__); print(platform.python_version())"
    file, version = _python("-c", code).split()
    assert Path(file).name == "platform.py"
    assert not Path(file).is_relative_to(ROOT)
    assert version.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


@pytest.mark.parametrize("folder", ["platform/swiftkv", "jobs", "tests", "dashboards", "scripts"])
def test_no_module_is_named_like_a_standard_one_or_vaguely(folder: str) -> None:
    if not (ROOT / folder).is_dir():
        pytest.skip(f"{folder}/ does not exist")
    by_design = {PACKAGE / "distill" / "profile.py"}  # design section 4: `distill/` holds `profile`
    for path in _modules_below(ROOT / folder) - by_design:
        assert path.stem not in sys.stdlib_module_names, f"{path} shadows a standard module"
        assert path.stem not in ("utils", "util", "helpers", "manager"), f"{path}: name what it holds"


def test_jobs_are_thin() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert jobs
    for job in jobs:
        assert len(job.read_text().splitlines()) <= 150, job


def test_every_module_says_what_it_does() -> None:
    empty_packages = {path for path in PACKAGE.rglob("__init__.py") if not path.read_text().strip()}
    for path in _modules_below(PACKAGE) - empty_packages:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


# Who imports whom.


def test_rooms_import_only_what_the_design_allows() -> None:
    assert _forbidden_imports(SOURCE) == []


def test_rooms_stay_away_from_libraries_that_are_not_theirs() -> None:
    found = []
    for path in sorted(_modules_below(PACKAGE)):
        for library in FORBIDDEN_LIBRARIES.get(_room(path, SOURCE), ()):
            found += [f"{path}: {name}" for name in _imports(path, SOURCE) if name.split(".")[0] == library]
    assert found == []


@pytest.mark.parametrize(
    ("file", "line", "is_allowed"),
    [
        ("model/a.py", "from swiftkv.spec import ModelShape", True),
        ("model/a.py", "from .b import c", True),
        ("model/a.py", "from swiftkv.engine.plugin import register", False),
        ("model/a.py", "def f():\n    from swiftkv import engine", False),
        ("model/deep/a.py", "from ... import engine", False),
        ("capacity/a.py", "from swiftkv.serving.policy import size_pools", True),
        ("capacity/a.py", "from swiftkv.serving import policy", True),
        ("capacity/a.py", "from swiftkv.serving import gateway", False),
        ("bench/a.py", "import swiftkv.cli.main", False),
        ("spec.py", "import swiftkv.metrics", False),
        ("cluster.py", "import swiftkv.spec", False),
        ("stray.py", "import os", False),
    ],
)
def test_the_import_check_sees_every_form_of_import(tmp_path: Path, file: str, line: str, is_allowed: bool) -> None:
    path = tmp_path / "swiftkv" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert (_forbidden_imports(tmp_path) == []) is is_allowed


def _forbidden_imports(source: Path) -> list[str]:
    """`file imports what` for each import of ours that the table does not allow, and each file in no room."""
    found = []
    for path in sorted(_modules_below(source / "swiftkv")):
        room = _room(path, source)
        if room != "__init__" and room not in MAY_IMPORT:
            found.append(f"{path} is in no room of the design's table")
            continue
        for target in _our_imports(path, source):
            if not _is_allowed(room, target):
                found.append(f"{path} imports swiftkv.{target}")
    return found


def _is_allowed(room: str, target: str) -> bool:
    """Whether a module of `room` may import `target`, a dotted name below swiftkv."""
    if target.split(".")[0] in (room, "__version__"):
        return True
    allowed = MAY_IMPORT.get(room, set())
    if allowed is ANYTHING:
        return room == "cli" or target.split(".")[0] != "cli"
    if room not in ONLY_LISTED and room != "__init__":
        allowed = allowed | FOR_EVERY_ROOM
    return any(target == name or target.startswith(name + ".") for name in allowed)


def _our_imports(path: Path, source: Path) -> list[str]:
    names = (name.removeprefix("swiftkv.") for name in _imports(path, source) if name.startswith("swiftkv."))
    return sorted(set(names))


def _imports(path: Path, source: Path) -> Iterator[str]:
    """Absolute dotted names of all imports in a file, those inside functions included."""
    package = list(path.relative_to(source).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _room(path: Path, source: Path) -> str:
    return path.relative_to(source / "swiftkv").with_suffix("").parts[0]


def _modules_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*.py") if "__pycache__" not in path.parts}


# What loads without heavy libraries.


LIGHT_MODULES = [
    "swiftkv",
    "swiftkv.config",
    "swiftkv.errors",
    "swiftkv.spec",
    "swiftkv.families",
    "swiftkv.distill.recipe",
    "swiftkv.serving.config",
    "swiftkv.serving.gateway.settings",
    "swiftkv.serving.rollout.settings",
    "swiftkv.serving.policy.decision",
    "swiftkv.registry",
    *(f"swiftkv.registry.{path.stem}" for path in sorted((PACKAGE / "registry").glob("[!_]*.py"))),
]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_module_loads_without_heavy_libraries(module: str) -> None:
    assert _heavy_after(f"import {module}") == ""


def test_help_loads_no_heavy_library() -> None:
    code = (
        "from swiftkv.cli.main import main; sys.argv = ['swiftkv', '--help']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code"
    )
    assert _heavy_after(code) == ""


def test_help_answers_within_a_second() -> None:
    command = Path(sys.executable).parent / "swiftkv"
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=60)
        durations.append(time.perf_counter() - start)
        assert "SwiftKV" in shown.stdout
    assert min(durations) < 1.0, durations


def _heavy_after(code: str) -> str:
    """Names of the heavy libraries loaded after running `code` in a fresh interpreter."""
    report = f"\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return _python("-c", "import sys\n" + code + report).splitlines()[-1]


# Errors.


def _error_classes() -> list[type[errors.SwiftKVError]]:
    found, waiting = [], [errors.SwiftKVError]
    while waiting:
        error_class = waiting.pop()
        found.append(error_class)
        waiting += error_class.__subclasses__()
    return found


@pytest.mark.parametrize("error_class", _error_classes())
def test_error_crosses_processes_with_its_message(error_class: type[errors.SwiftKVError]) -> None:
    error = pickle.loads(pickle.dumps(error_class("given 3; allowed 1 or 2; choose one.")))
    assert type(error) is error_class
    assert str(error) == "given 3; allowed 1 or 2; choose one."
    assert "__init__" not in vars(error_class)


@pytest.mark.parametrize("error_class", [c for c in _error_classes() if c is not errors.SwiftKVError])
def test_error_is_also_a_standard_one(error_class: type[errors.SwiftKVError]) -> None:
    standard = {c for c in vars(builtins).values() if isinstance(c, type) and issubclass(c, Exception)}
    assert (set(error_class.__mro__) & standard) - {Exception}


def test_the_error_tree_is_in_one_file() -> None:
    names = {error_class.__name__ for error_class in _error_classes()}
    for path in _modules_below(PACKAGE) - {PACKAGE / "errors.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                assert not bases & names, f"{path}: {node.name} belongs in errors.py"


# Shipped settings and entry points.


def _yaml_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).glob("*.y*ml"))


@pytest.mark.parametrize("path", _yaml_files("jobs/recipes"), ids=lambda path: path.name)
def test_recipe_parses(path: Path) -> None:
    from swiftkv.distill.recipe import Recipe

    load_yaml(path, Recipe)


@pytest.mark.parametrize("path", _yaml_files("deployments/serve"), ids=lambda path: path.name)
def test_serve_application_s_builder_exists(path: Path) -> None:
    applications = yaml.safe_load(path.read_text())["applications"]
    assert applications, "a Serve config without applications serves nothing"
    for application in applications:
        _assert_defined(application["import_path"])


def test_entry_points_name_what_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugins = project["entry-points"]["vllm.general_plugins"]
    assert plugins, "vLLM finds the models by this entry point"
    for target in [*plugins.values(), *project["scripts"].values()]:
        _assert_defined(target)


def test_no_code_of_a_model_folder_is_ever_run() -> None:
    for path in _modules_below(PACKAGE) | _modules_below(ROOT / "jobs"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}:{node.lineno}"


def _assert_defined(target: str) -> None:
    """`package.module:name` is a function or class at the top of a module, found without importing it."""
    module, _, name = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{target}: no module {module}"
    body = ast.parse(Path(spec.origin).read_text()).body
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert name in {node.name for node in body if isinstance(node, definitions)}, target


def _python(*arguments: str) -> str:
    """Standard output of a fresh interpreter started in the repository root."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# The wheel.


def test_the_wheel_holds_the_package_its_command_and_its_plugin(tmp_path: Path) -> None:
    from zipfile import ZipFile

    _python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name.split("/")[0] for name in names if not name.endswith("/")} == {
        "swiftkv",
        next(name.split("/")[0] for name in names if ".dist-info" in name),
    }
    sources = {str(path.relative_to(SOURCE)) for path in _modules_below(PACKAGE)}
    assert sources <= set(names)
    assert "swiftkv = swiftkv.cli.main:main" in entry_points
    assert "[vllm.general_plugins]\nswiftkv = swiftkv.engine.plugin:register" in entry_points
