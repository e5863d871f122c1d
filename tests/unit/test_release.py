"""A release is refused where something disagrees, and a package that is not sound is found out."""

import importlib
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

from swiftkv import __version__

ROOT = Path(__file__).resolve().parents[2]
METADATA = "Metadata-Version: 2.4\nName: swiftkv\nVersion: 1.2.0\n"
GOOD = {
    "swiftkv/__init__.py": "",
    "swiftkv/spec.py": "",
    "swiftkv-1.2.0.dist-info/METADATA": METADATA,
    "swiftkv-1.2.0.dist-info/licenses/LICENSE": "",
}


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("release")


def write_wheel(folder: Path, files: dict[str, str]) -> Path:
    wheel = folder / "swiftkv-1.2.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def git(folder: Path, *arguments: str) -> None:
    who = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.org",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "tag.gpgsign=false",
    ]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean tree that is ready for version 1.2.0."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 1.2.0, 2026-12-01\n\n- All of it.\n")
    (folder / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "All")
    return folder


def test_a_tree_that_is_ready_has_no_obstacles(release: ModuleType, checkout: Path) -> None:
    assert release.find_obstacles(checkout, "1.2.0") == []


def test_each_obstacle_is_named(release: ModuleType, checkout: Path) -> None:
    (checkout / "new.txt").write_text("")
    git(checkout, "tag", "v1.2.1")
    found = release.find_obstacles(checkout, "1.2.1")
    assert len(found) == 4
    assert "not clean" in found[0] and "new.txt" in found[0]
    assert "v1.2.1 exists" in found[1]
    assert "no section `## 1.2.1, DATE`" in found[2]
    assert "names version 1.2.0 instead of 1.2.1" in found[3]


@pytest.mark.parametrize(
    ("heading", "is_found"),
    [
        ("## 1.2.0, 2026-12-01", True),
        ("## [1.2.0]", True),
        ("## 1.2.0 of today", True),
        ("## 1.2.01", False),
        ("## 11.2.0", False),
    ],
)
def test_the_section_of_a_version_is_found(release: ModuleType, heading: str, is_found: bool) -> None:
    assert bool(release.find_changes_section(f"# Changelog\n\n{heading}\n", "1.2.0")) is is_found


def test_a_sound_wheel_has_no_faults(release: ModuleType, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, GOOD)
    assert release.find_wheel_faults(wheel, "1.2.0", ["swiftkv/__init__.py", "swiftkv/spec.py"]) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tests/test_spec.py": ""}, "tests: does not belong into a wheel"),
        ({"swiftkv/tests/deep.py": ""}, "swiftkv/tests/deep.py: a test"),
        ({"swiftkv/test_spec.py": ""}, "swiftkv/test_spec.py: a test"),
        ({"swiftkv/conftest.py": ""}, "swiftkv/conftest.py: a test"),
        ({"scripts/lock.py": ""}, "scripts: does not belong into a wheel"),
        ({"swiftkv/spec.py": None}, "swiftkv/spec.py: missing"),
        ({"swiftkv-1.2.0.dist-info/licenses/LICENSE": None}, "no licence"),
        ({"swiftkv-1.2.0.dist-info/METADATA": METADATA.replace("1.2.0", "1.1.0")}, "no metadata of version 1.2.0"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_named(release: ModuleType, tmp_path: Path, changes, fault: str) -> None:
    files = {name: content for name, content in (GOOD | changes).items() if content is not None}
    assert fault in release.find_wheel_faults(write_wheel(tmp_path, files), "1.2.0", ["swiftkv/spec.py"])


def test_what_is_wrong_with_a_source_distribution_is_named(release: ModuleType, tmp_path: Path) -> None:
    sdist = tmp_path / "swiftkv-1.1.0.tar.gz"
    (tmp_path / "PKG-INFO").write_text("")
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(tmp_path / "PKG-INFO", "swiftkv-1.2.0/PKG-INFO")
    faults = release.find_sdist_faults(sdist, "1.2.0")
    assert "LICENSE: missing" in faults and "it is named swiftkv-1.1.0.tar.gz" in faults
    assert not any("PKG-INFO" in fault for fault in faults)


def test_this_checkout_makes_a_sound_package(release: ModuleType, tmp_path: Path) -> None:
    """Builds it, and imports it where nothing else is installed."""
    faults, files = release.check_package(ROOT, __version__, tmp_path)
    assert faults == []
    assert [file.name for file in files] == [
        f"swiftkv-{__version__}-py3-none-any.whl",
        f"swiftkv-{__version__}.tar.gz",
    ]


def test_a_dry_run_tags_nothing(release: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = checkout / "platform" / "swiftkv"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1.2.0"\n')
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "The package")
    files = [checkout.parent / name for name in ("a.whl", "a.tar.gz")]
    for file in files:
        file.write_text("")
    monkeypatch.setattr(release, "REPOSITORY", checkout)
    monkeypatch.setattr(release, "check_package", lambda repository, version, folder: ([], files))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "a")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    assert release.main([]) == 0
    assert release.git(checkout, "tag") == "" and not (checkout / "dist").exists()
    assert release.main(["--tag"]) == 0
    assert release.git(checkout, "tag") == "v1.2.0" and len(list((checkout / "dist").iterdir())) == 2
    assert release.main(["--tag"]) == 1  # the tag is there, and dist/ is not clean
    monkeypatch.setattr(release, "check_package", lambda repository, version, folder: (["broken"], files))
    assert release.main([]) == 1
