"""The quickstart's report: a table on the terminal and in Markdown, two charts, and every number as JSON.

Called by: run.py.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

TEACHER_COLOUR, STUDENT_COLOUR = "#8a8f98", "#2f6fde"


def write_report(figures: dict[str, Any], progress: Path, folder: Path) -> None:
    """Print the summary, and write numbers.json, summary.md, loss.png and speed.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    curve = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()]
    numbers = figures | {"loss_curve": curve}
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    _draw_losses(curve, folder / "loss.png")
    _draw_speed(figures["speed"], folder / "speed.png")
    rows = _build_rows(figures)
    _print_table(rows, figures)
    (folder / "summary.md").write_text(_build_markdown(rows, figures), encoding="utf-8")
    print(f"report: {folder}")


def _build_rows(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of: what, teacher, student, student against teacher."""
    speed, evaluation = figures["speed"], figures["evaluation"]
    before, after = evaluation["student_before"], evaluation["student_after"]
    teacher_perplexity = evaluation["teacher_perplexity"]

    def timed(name: str, ratio: float) -> tuple[str, str, str]:
        return f"{speed[f'teacher_{name}'] * 1e3:.1f} ms", f"{speed[f'student_{name}'] * 1e3:.1f} ms", f"{ratio:.2f} x"

    tokens_per_s = [f"{speed[f'{side}_prompt_tokens_per_s']:,.0f}" for side in ("teacher", "student")]
    allowed = f"{speed['speedup']:.2f} x (of {speed['flop_speedup']:.2f})"
    return [
        ("prompt tokens/s", *tokens_per_s, allowed),
        ("TTFT", *timed("ttft_s", speed["ttft_ratio"])),
        ("TPOT", *timed("tpot_s", speed["tpot_ratio"])),
        ("perplexity, before", f"{teacher_perplexity:.2f}", *_compare(before, teacher_perplexity)),
        ("perplexity, after", f"{teacher_perplexity:.2f}", *_compare(after, teacher_perplexity)),
        ("same next token, before", "", f"{before['agreement_frac']:.1%}", ""),
        ("same next token, after", "", f"{after['agreement_frac']:.1%}", ""),
        ("KL, before", "", f"{before['kl_nats']:.4f} nats", ""),
        ("KL, after", "", f"{after['kl_nats']:.4f} nats", ""),
    ]


def _compare(student: dict[str, float], teacher_perplexity: float) -> tuple[str, str]:
    perplexity = student["student_perplexity"]
    return f"{perplexity:.2f}", f"{perplexity / teacher_perplexity:.3f} x"


def _describe_run(figures: dict[str, Any]) -> str:
    speed, stages = figures["speed"], figures["stages_s"]
    return (
        f"{speed['hardware']}, prompts of {speed['prompt_tokens']} tokens, "
        f"{sum(stages.values()) / 60:.1f} minutes, {figures['peak_memory_gib']:.1f} GiB at most"
    )


def _print_table(rows: list[tuple[str, str, str, str]], figures: dict[str, Any]) -> None:
    table = Table("", "teacher", "student", "student / teacher", title=_describe_run(figures))
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _build_markdown(rows: list[tuple[str, str, str, str]], figures: dict[str, Any]) -> str:
    lines = ["| | teacher | student | student / teacher |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in figures["stages_s"].items())
    return (
        f"# Quickstart\n\n`make quickstart` on {_describe_run(figures)}.\n\n"
        + "\n".join(lines)
        + f"\n\nStages: {stages}.\n\n![loss](loss.png)\n![speed](speed.png)\n"
    )


def _draw_losses(curve: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [entry["step"] for entry in curve]
    for part, title in (("logits_kl", "logits KL (nats, T = 2)"), ("hidden_loss", "hidden-state MSE")):
        axes.plot(steps, [entry[part] for entry in curve], label=title)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title="Distillation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_speed(speed: dict[str, Any], path: Path) -> None:
    charts = (
        ("prompt_tokens_per_s", "prompt tokens/s", "more is better", 1.0),
        ("ttft_s", "TTFT (ms)", "less is better", 1e3),
        ("tpot_s", "TPOT (ms)", "less is better", 1e3),
    )
    figure, axes = plt.subplots(1, len(charts), figsize=(9, 3.6), layout="constrained")
    for axis, (name, title, better, scale) in zip(axes, charts, strict=True):
        values = [speed[f"{side}_{name}"] * scale for side in ("teacher", "student")]
        bars = axis.bar(["teacher", "SwiftKV"], values, color=[TEACHER_COLOUR, STUDENT_COLOUR])
        axis.bar_label(bars, fmt="{:,.1f}" if max(values) < 1000 else "{:,.0f}")
        axis.set(title=title, xlabel=better)
        axis.margins(y=0.15)
    figure.suptitle(f"{speed['prompt_tokens']}-token prompts, same vLLM settings, {speed['hardware']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
