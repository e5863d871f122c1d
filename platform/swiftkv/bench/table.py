"""The tables of benches, with the rows and bounds of the engine's: how they are shown as text, picture and JSON.

Measures nothing.
Called by: bench/engine.py, cli/bench.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swiftkv.bench.ratios import Ratio


@dataclass(frozen=True)
class Row:
    """One promise: what is compared with what, and the bound of the ratio."""

    name: str
    what: str
    bound: float | None
    """None: reported as it is."""
    is_least: bool = True
    """Whether the ratio must be at least the bound; otherwise at most."""

    @property
    def limit(self) -> str:
        """The bound with its sign."""
        return "none" if self.bound is None else f"{'≥' if self.is_least else '≤'} {self.bound}"


ROWS = (
    Row("prefill", "prompt tokens/s over the teacher's, over what the FLOP count allows", 0.95),
    Row("throughput", "16 requests at once, prompts 10 times their answers: total tokens/s over the teacher's", 1.55),
    Row("ttft", "the same load: mean TTFT over the teacher's", 0.62, is_least=False),
    Row("tpot", "one stream: TPOT over the teacher's, each in the better of eager and compiled", 1.02, is_least=False),
    Row("kv-group-2", "tokens that fit a fixed KV budget over the teacher's, group size 2", 1.33),
    Row("kv-group-4", "the same, group size 4", 1.6),
    Row("kv-group-2-fp8", "the same, group size 2 and FP8 KV against 16 bits", 2.66),
    Row(
        "prefill-half-weights",
        "weight bytes that the prefill half loads over the whole model's, 32 layers",
        0.58,
        False,
    ),
    Row("prefill-half-speed", "prompt tokens/s of the prefill half over the whole SwiftKV model's", 0.98),
)
ROW_NAMES = tuple(row.name for row in ROWS)


@dataclass(frozen=True)
class Result:
    """A row as measured."""

    row: Row
    ratio: Ratio
    teacher: str
    """What the ratio's denominator was, with its unit."""
    student: str
    """What its numerator was."""

    @property
    def is_met(self) -> bool:
        """Whether the median keeps the bound, if there is one."""
        if self.row.bound is None:
            return True
        return self.ratio.median >= self.row.bound if self.row.is_least else self.ratio.median <= self.row.bound

    def to_json(self) -> dict[str, Any]:
        """The result as a flat object."""
        interval = {key: round(value, 4) for key, value in asdict(self.ratio).items() if key != "pairs"}
        return {
            "row": self.row.name,
            "what": self.row.what,
            "bound": self.row.limit.replace("≥", "at least").replace("≤", "at most"),
            "is_met": self.is_met,
            **interval,
            "pairs": [round(value, 4) for value in self.ratio.pairs],
            "over": self.teacher,
            "measured": self.student,
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any], row: Row) -> "Result":
        """The row as it was measured at another time."""
        ratio = Ratio(entry["median"], entry["low"], entry["high"], entry["pairs"])
        return cls(row, ratio, entry["over"], entry["measured"])


def build_markdown(results: Sequence[Result]) -> str:
    """The table in Markdown."""
    lines = ["| what | bound | median | 95% interval | from | met |", "| --- | --- | --- | --- | --- | --- |"]
    for result in results:
        ratio, row = result.ratio, result.row
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}" if len(ratio.pairs) > 1 else "counted, not timed"
        values = (row.what, row.limit, f"{ratio.median:.3f}", interval, f"{result.student} / {result.teacher}")
        met = "" if row.bound is None else "yes" if result.is_met else "**no**"
        lines.append(f"| {' | '.join(values)} | {met} |")
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """The rows with a bound as a picture: how far each median, with its interval, is past it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in results if result.row.bound is not None]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(results) + 1.4))
    for index, result in enumerate(reversed(results)):
        margins = [_compute_margin(result.row, value) for value in (result.ratio.low, result.ratio.high)]
        colour = "#2f6fde" if result.is_met else "#d1495b"
        axes.plot(margins, [index, index], color=colour, linewidth=3, solid_capstyle="round", alpha=0.4)
        margin = _compute_margin(result.row, result.ratio.median)
        axes.plot(margin, index, "o", color=colour)
        axes.annotate(
            f"{result.ratio.median:.2f} ({result.row.limit})",
            (max(*margins, margin), index),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(0, color="#8a8f98", linewidth=1)
    axes.set_yticks(range(len(results)), [result.row.name for result in reversed(results)])
    axes.set_xlabel("better than the bound by, %")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.25, y=0.1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _compute_margin(row: Row, value: float) -> float:
    """Percent by which a ratio is on the good side of the row's bound."""
    assert row.bound is not None
    if not row.bound:  # nothing may be counted: a percent for each
        return value if row.is_least else -value
    return 100 * (value / row.bound - 1 if row.is_least else 1 - value / row.bound)
