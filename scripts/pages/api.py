"""The pages of the API reference: a page for each room of the package, with what its modules say of themselves.

Holds no texts: mkdocstrings reads the sources when the site is built, and imports none of them.
Called by: write.py. Reads: platform/swiftkv.
"""

import ast
from pathlib import Path

from pages.markdown import MADE

_PACKAGE = Path(__file__).resolve().parents[2] / "platform" / "swiftkv"

ROOMS = {
    "foundations": ("What every room may import", ("config", "errors", "spec", "families", "hf_config", "text", "hub")),
    "model": ("Models on the Hugging Face side", ("model",)),
    "distill": ("Distilling", ("distill",)),
    "evaluate": ("Evaluating", ("evaluate",)),
    "registry": ("The registry", ("registry",)),
    "engine": ("The engine", ("engine",)),
    "serving": ("Serving: pools", ("serving",)),
    "gateway": ("Serving: the gateway", ("serving.gateway",)),
    "policy": ("Serving: the policy", ("serving.policy",)),
    "rollout": ("Serving: rollouts", ("serving.rollout",)),
    "usage": ("Serving: usage records", ("serving.usage",)),
    "metrics": ("Metrics", ("metrics",)),
    "capacity": ("The simulated fleet", ("capacity",)),
    "loadgen": ("The load generator", ("loadgen",)),
    "clusters": ("Clusters and jobs", ("cluster", "jobs")),
    "bench": ("Benchmarks", ("bench", "bench.serve")),
}
"""Pages, and the rooms on each. The command line has a page of its own (reference/commands.md)."""

NOT_SHOWN = {"cli"}


def build_pages() -> dict[str, str]:
    """The pages by name, the first being the overview."""
    pages = {name: _build_page(title, rooms) for name, (title, rooms) in ROOMS.items()}
    return {"index": _build_overview(), **pages}


def list_modules(room: str) -> list[str]:
    """The room's modules by their full names; those of rooms inside it are not among them."""
    path = _PACKAGE.joinpath(*room.split("."))
    if path.with_suffix(".py").is_file():
        return [f"swiftkv.{room}"]
    own = [f"swiftkv.{room}"] if _has_docstring(path / "__init__.py") else []
    return own + [f"swiftkv.{room}.{file.stem}" for file in sorted(path.glob("[!_]*.py"))]


def _has_docstring(path: Path) -> bool:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is not None


def _build_page(title: str, rooms: tuple[str, ...]) -> str:
    modules = [module for room in rooms for module in list_modules(room)]
    parts = [MADE.format(source="platform/swiftkv"), f"# {title}", *(f"::: {module}" for module in modules)]
    return "\n\n".join(parts) + "\n"


def _build_overview() -> str:
    lines = [
        f"- [{title}]({name}.md): {', '.join(f'`{room}`' for room in rooms)}" for name, (title, rooms) in ROOMS.items()
    ]
    intro = (
        "What the modules of the package `swiftkv` say of themselves, room by room. Which room may import which is "
        "fixed by `tests/unit/test_contracts.py`. Import a thing from the module that defines it: packages re-export "
        "nothing but what their own docstring says. To follow a training batch or a request through these files, read "
        "the code tour in [CONTRIBUTING.md](../../CONTRIBUTING.md)."
    )
    return f"{MADE.format(source='platform/swiftkv')}\n\n# API\n\n{intro}\n\n" + "\n".join(lines) + "\n"
