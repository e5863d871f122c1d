"""What the audit asks about: every lock by hash, and torch, which no lock holds."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_lock_and_torch_are_asked_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    audit = importlib.import_module("audit")
    commands = audit.build_commands("python", tmp_path / "torch.txt")
    asked = [command[-1] for command in commands]
    assert asked == [
        *(str(ROOT / "requirements" / f"{name}.txt") for name in ("cpu", "cuda", "docs", "image-tools")),
        str(tmp_path / "torch.txt"),
    ]
    assert all("--require-hashes" in command for command in commands[:-1]) and "--no-deps" in commands[-1]
    monkeypatch.setitem(audit.IGNORED, "CVE-0", "does not concern us")
    assert all("CVE-0" in command for command in audit.build_commands("python", tmp_path / "torch.txt"))
    assert audit.read_torch_pin((ROOT / "pyproject.toml").read_text()).startswith("torch==")
