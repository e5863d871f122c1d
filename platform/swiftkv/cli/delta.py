"""`swiftkv delta save | restore` and `swiftkv export-snowflake`: a student as a difference to its teacher, and whole.

Called by: cli/main.py. Calls: model/delta.py, distill/teachers.py.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

delta_app = typer.Typer(help="Store a student as only its new tensors, and read it back whole.", no_args_is_help=True)

Student = Annotated[Path, typer.Argument(help="Folder of a whole SwiftKV checkpoint.", show_default=False)]
Output = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)]


@delta_app.command("save")
def save(
    student: Student,
    output: Output,
    base: Annotated[str, typer.Option(help="The teacher: its folder, or its name on the hub.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="The teacher's commit on the hub.")] = None,
) -> None:
    """Write only what distillation made, and which teacher it belongs to."""
    from swiftkv.distill.teachers import resolve_teacher
    from swiftkv.model.delta import Base, save_delta

    save_delta(student, output, Base.from_folder(resolve_teacher(Path(base), revision)))
    whole, delta = _count_bytes(student), _count_bytes(output)
    typer.echo(f"delta: {output}, {delta:,} bytes of {whole:,} ({delta / whole:.1%})")


@delta_app.command("restore")
def restore(
    delta: Annotated[Path, typer.Argument(help="Folder of `swiftkv delta save`.", show_default=False)],
    output: Output,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the teacher.", show_default="what the delta names")
    ] = None,
) -> None:
    """Write the whole checkpoint, after checking that the teacher is the right one, byte for byte."""
    from swiftkv.distill.teachers import resolve_teacher
    from swiftkv.model.delta import load_delta_record, restore_delta

    record = load_delta_record(delta)
    restore_delta(delta, base or resolve_teacher(Path(record.base_name), record.base_revision), output)
    typer.echo(f"restored: {output}")


def export_snowflake(
    student: Student,
    output: Output,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of all tensors.", show_default="as they are"),
    ] = None,
) -> None:
    """Write a checkpoint for Snowflake's own training and serving code (Llama and Qwen2)."""
    import torch

    from swiftkv.model.delta import export_snowflake as export

    export(student, output, None if dtype is None else getattr(torch, dtype))
    typer.echo(f"exported: {output}")


def _count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
