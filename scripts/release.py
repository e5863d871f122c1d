"""Builds a release and tries it in an empty environment; tags it if told to: `make release`, `make release TAG=1`.

Without --tag it changes nothing: it says what would stop a release, and fails only if the package itself is not sound.
With --tag all of it must hold; then wheel and source distribution go to dist/ and the commit gets the tag v<version>.
Publishes nothing and pushes nothing.
Called by: the Makefile, .github/workflows/ci.yml. Calls: git, hatchling, pip.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "swiftkv"
NOT_SHIPPED = (
    "tests",
    "test",
    "conftest",
    "reports",
    "jobs",
    "scripts",
    "docs",
    "dashboards",
    "examples",
    "deployments",
)
"""Top folders or modules that a wheel must not have: they would be importable wherever it is installed."""

PROBE = """
import importlib.metadata, importlib.util, pathlib, sys
import swiftkv
assert pathlib.Path(swiftkv.__file__).is_relative_to(sys.prefix), swiftkv.__file__
print(swiftkv.__version__)
print(importlib.metadata.version("swiftkv"))
points = importlib.metadata.distribution("swiftkv").entry_points
for point in points:
    assert importlib.util.find_spec(point.value.partition(":")[0]) is not None, point.value
for line in sorted(f"{point.group}: {point.name} = {point.value}" for point in points):
    print(line)
"""
"""Run in an environment that has the wheel and nothing else, so it may import nothing that needs a dependency."""


# --- what the repository says ---


def read_version(source: str) -> str:
    """The version in the text of the package's __init__.py."""
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if not match:
        raise SystemExit("release: platform/swiftkv/__init__.py has no __version__")
    return match[1]


def find_changes_section(changelog: str, version: str) -> str | None:
    """The heading of the version's section in CHANGELOG.md, such as `## 0.2.0, 2026-12-01`; None if there is none."""
    match = re.search(rf"^## \[?{re.escape(version)}\]?(?:[ ,].*)?$", changelog, flags=re.MULTILINE)
    return match[0] if match else None


def list_entry_points(pyproject: str) -> list[str]:
    """What pyproject.toml names, as PROBE prints it."""
    project = tomllib.loads(pyproject)["project"]
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    return sorted(f"{group}: {name} = {value}" for group, points in groups.items() for name, value in points.items())


def find_obstacles(repository: Path, version: str) -> list[str]:
    """What stands against tagging this commit, a line each; empty if nothing does."""
    found = []
    if changed := git(repository, "status", "--porcelain"):
        found.append(f"the tree is not clean:\n{changed}")
    if git(repository, "tag", "--list", f"v{version}"):
        found.append(f"the tag v{version} exists; raise __version__ in platform/swiftkv/__init__.py")
    if find_changes_section((repository / "CHANGELOG.md").read_text(encoding="utf-8"), version) is None:
        found.append(f"CHANGELOG.md has no section `## {version}, DATE`")
    cited = re.search(r"^version: (\S+)$", (repository / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1].strip("\"'") != version:
        found.append(f"CITATION.cff names version {cited[1] if cited else 'none'} instead of {version}")
    return found


# --- what was built ---


def find_wheel_faults(wheel: Path, version: str, sources: Sequence[str]) -> list[str]:
    """What is wrong with a wheel's content. `sources`: files that it must have, such as swiftkv/spec.py."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        information = f"{PACKAGE}-{version}.dist-info"
        found = [f"{name}: damaged" for name in filter(None, [archive.testzip()])]
        metadata = archive.read(f"{information}/METADATA").decode() if f"{information}/METADATA" in names else ""
    if f"\nVersion: {version}\n" not in f"\n{metadata}":
        found.append(f"no metadata of version {version}")
    if not any(name.startswith(f"{information}/licenses/") for name in names):
        found.append("no licence")
    tops = {name.split("/")[0] for name in names} - {PACKAGE, information}
    found += [f"{top}: does not belong into a wheel" for top in sorted(tops)]
    found += [
        f"{name}: a test"
        for name in names
        if {part.removesuffix(".py") for part in name.split("/")} & set(NOT_SHIPPED[:3])
        or name.split("/")[-1].startswith("test_")
    ]
    found += [f"{source}: missing" for source in sources if source not in names]
    return found


def find_sdist_faults(sdist: Path, version: str) -> list[str]:
    """What is wrong with a source distribution's content."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("pyproject.toml", "README.md", "LICENSE", f"platform/{PACKAGE}/__init__.py", "PKG-INFO")
    found = [f"{name}: missing" for name in needed if name not in names]
    if sdist.name != f"{PACKAGE}-{version}.tar.gz":
        found.append(f"it is named {sdist.name}")
    return found


def list_sources(repository: Path) -> list[str]:
    """The package's files that git knows, as a wheel has them."""
    listed = git(repository, "ls-files", f"platform/{PACKAGE}").splitlines()
    return [name.removeprefix("platform/") for name in listed]


def try_wheel(wheel: Path, folder: Path) -> list[str]:
    """What PROBE prints in a new environment that holds the wheel and none of its dependencies.

    Raises: subprocess.CalledProcessError if it cannot be installed or imported.
    """
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    run([*install, "--no-deps", "--no-index", str(wheel)], cwd=folder)
    return run([python, "-I", "-c", PROBE], cwd=folder).splitlines()


def build(repository: Path, folder: Path) -> tuple[Path, Path]:
    """The wheel and the source distribution of the tree, in `folder`."""
    run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=repository)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


# --- small things ---


def git(repository: Path, *arguments: str) -> str:
    """What git says."""
    return run(["git", *arguments], cwd=repository).rstrip("\n")


def run(command: list[str], cwd: Path) -> str:
    """What the command printed. Raises: subprocess.CalledProcessError after printing what it complained of."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        print(result.stdout + result.stderr, file=sys.stderr)
    result.check_returncode()
    return result.stdout


def check_package(repository: Path, version: str, folder: Path) -> tuple[list[str], list[Path]]:
    """What is wrong with the package that the tree makes, and its two files."""
    wheel, sdist = build(repository, folder / "dist")
    faults = [f"{wheel.name}: {fault}" for fault in find_wheel_faults(wheel, version, list_sources(repository))]
    faults += [f"{sdist.name}: {fault}" for fault in find_sdist_faults(sdist, version)]
    expected = [version, version, *list_entry_points((repository / "pyproject.toml").read_text(encoding="utf-8"))]
    said = try_wheel(wheel, folder / "venv")
    if said != expected:
        faults.append(f"{wheel.name}: installed, it says {said} instead of {expected}")
    return faults, [wheel, sdist]


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if the package is not sound, or, with --tag, if anything stands against the release."""
    parser = argparse.ArgumentParser(description="Build a release and try it; a dry run without --tag.")
    parser.add_argument("--tag", action="store_true", help="tag the commit and leave the files in dist/")
    tag = parser.parse_args(arguments).tag
    version = read_version((REPOSITORY / "platform" / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    obstacles = find_obstacles(REPOSITORY, version)
    for obstacle in obstacles:
        print(f"release: {'refused' if tag else 'a release would be refused'}: {obstacle}", file=sys.stderr)
    if tag and obstacles:
        return 1
    with tempfile.TemporaryDirectory(prefix="swiftkv-release-") as folder:
        faults, files = check_package(REPOSITORY, version, Path(folder))
        for fault in faults:
            print(f"release: {fault}", file=sys.stderr)
        if faults:
            return 1
        sizes = ", ".join(f"{file.name} ({file.stat().st_size:,} bytes)" for file in files)
        print(f"release: {sizes}: built, installed and imported without any dependency")
        if not tag:
            print(f"release: dry run; `make release TAG=1` would tag v{version} and fill dist/")
            return 0
        (REPOSITORY / "dist").mkdir(exist_ok=True)
        for file in files:
            shutil.copy2(file, REPOSITORY / "dist" / file.name)
    git(REPOSITORY, "tag", "--annotate", f"v{version}", "--message", f"Version {version}")
    print(f"release: tagged v{version}; dist/ holds its files. Push the tag when you are sure.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
