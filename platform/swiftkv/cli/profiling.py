"""`swiftkv profile`: which cut suits a teacher, before anything is trained.

Called by: cli/main.py. Calls: distill/profiling.py.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swiftkv.errors import ConfigError

if TYPE_CHECKING:
    from swiftkv.distill.profiling import CutCost, TeacherProfile


def profile(
    teacher: Annotated[Path, typer.Argument(help="Hugging Face folder of the teacher.", show_default=False)],
    data: Annotated[
        list[Path], typer.Option(help="JSONL of your own prompts; may be given again.", show_default=False)
    ],
    text_column: Annotated[str, typer.Option(help="Key of the text in each record.")] = "text",
    row_tokens: Annotated[int, typer.Option(help="Tokens per row.", min=2)] = 512,
    max_rows: Annotated[int, typer.Option(help="Rows looked at, spread over the data.", min=1)] = 16,
    cuts: Annotated[
        str | None,
        typer.Option(help="Layers to keep, with commas.", show_default="every eighth of the depth, 1/4 to 3/4"),
    ] = None,
    group_sizes: Annotated[
        str, typer.Option(help="Later layers per KV cache, with commas; used where they divide them.")
    ] = "1,2,4",
    max_kl: Annotated[
        float, typer.Option(help="Most KL, in nats, that the recommended cut may start from.", min=0)
    ] = 0.1,
    output: Annotated[Path | None, typer.Option(help="Also write profile.json and profile.png here.")] = None,
) -> None:
    """How alike a teacher's layers are, and what each cut and group size costs before distillation.

    Trains nothing. KL is what distillation starts from. The quickstart's run took away five sixths of it, so the
    default of --max-kl is a rule of thumb, no promise.
    """
    kept_layers = None if cuts is None else _parse_numbers("--cuts", cuts)
    sizes = _parse_numbers("--group-sizes", group_sizes)
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: not a folder. Give another --output.")
    from swiftkv.distill.profiling import list_cuts, profile_teacher
    from swiftkv.model.checkpoint import load_tokenizer, read_config
    from swiftkv.text import build_rows, choose_evenly

    specs = list_cuts(teacher, kept_layers, sizes)
    context = int(read_config(teacher).get("max_position_embeddings") or row_tokens)
    if row_tokens > context:
        raise ConfigError(
            f"--row-tokens is {row_tokens}, but the teacher's context is {context} tokens: give at most that."
        )
    rows = choose_evenly(build_rows(load_tokenizer(teacher), data, text_column, row_tokens), max_rows)
    found = profile_teacher(teacher, rows, specs, lambda text: typer.echo(f"profile: {text}", err=True))
    recommended = found.recommend(max_kl)
    _print_table(found, recommended, max_kl)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        figures = asdict(found) | {"max_kl_nats": max_kl, "recommended": recommended and asdict(recommended)}
        (output / "profile.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        _draw(found, recommended, max_kl, teacher.name, output / "profile.png")
        typer.echo(f"profile: {output}", err=True)


def _parse_numbers(option: str, text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise ConfigError(f"{option} is {text!r}: give whole numbers from 1 on, with commas between, such as 1,2,4.")
    return numbers


def _print_table(found: "TeacherProfile", recommended: "CutCost | None", max_kl: float) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("layers kept", "group", "skipped", "FLOPs saved", "KV bytes", "KL (nats)", "agreement")
    table = Table(*columns, title=f"before distillation, {found.positions:,} positions")
    for cut in found.cuts:
        table.add_row(
            str(cut.num_key_value_layers),
            str(cut.key_value_group_size),
            f"{cut.skipped_frac:.1%}",
            f"{1 - 1 / cut.flop_speedup:.1%}",
            f"{cut.kv_bytes_frac:.1%}",
            f"{cut.kl_nats:.4f}",
            f"{cut.agreement_frac:.1%}",
            style="bold" if cut == recommended else None,
        )
    console = Console()
    console.print(table)
    if recommended is None:
        console.print(f"No cut starts from {max_kl} nats or less. Try fewer skipped layers, or a higher --max-kl.")
        return
    console.print(
        f"Recommended: num_key_value_layers: {recommended.num_key_value_layers}, "
        f"key_value_group_size: {recommended.key_value_group_size} "
        f"(the fewest prompt FLOPs of those that start from {max_kl} nats or less)."
    )


def _draw(found: "TeacherProfile", recommended: "CutCost | None", max_kl: float, name: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for title, values in (("leaving it", found.state_similarity), ("entering later layers", found.later_similarity)):
        left.plot(range(len(values)), values, "o-", label=title)
    left.set_xlabel("layer")
    left.set_ylabel("cosine of the state entering a layer and …")
    left.legend(frameon=False)
    for group_size in sorted({cut.key_value_group_size for cut in found.cuts}):
        cuts = [cut for cut in found.cuts if cut.key_value_group_size == group_size]
        skipped = [100 * cut.skipped_frac for cut in cuts]
        right.plot(skipped, [cut.kl_nats for cut in cuts], "o-", label=f"groups of {group_size}")
    if recommended is not None:
        spot = (100 * recommended.skipped_frac, recommended.kl_nats)
        right.plot(*spot, "o", markersize=14, fillstyle="none", color="#1d1f23", label="recommended")
    right.axhline(max_kl, color="#8a8f98", linewidth=1, linestyle="--", label=f"{max_kl} nats")
    right.set_xlabel("layers skipped, %")
    right.set_ylabel("KL before distillation, nats")
    right.set_yscale("log")
    right.legend(frameon=False)
    figure.suptitle(f"{name}, {found.positions:,} positions", fontsize=10)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
