"""`swiftkv`: the command line. Each command is a file beside this one; heavy libraries load inside commands.

Turns errors that a user can cause into one message and exit status 2. Called by: the `swiftkv` script.
"""

import signal
import sys
from collections.abc import Callable

import typer

from swiftkv.cli.bench import bench_app
from swiftkv.cli.cluster import down
from swiftkv.cli.delta import delta_app, export_snowflake
from swiftkv.cli.deploy import deploy
from swiftkv.cli.distill import distill
from swiftkv.cli.evaluate import evaluate
from swiftkv.cli.key import key
from swiftkv.cli.models import models_app
from swiftkv.cli.node import node_app
from swiftkv.cli.profiling import profile
from swiftkv.cli.publish import promote, publish, rollback
from swiftkv.cli.serve import serve
from swiftkv.cli.top import top
from swiftkv.cli.usage import usage
from swiftkv.config import keep_caches_at_home
from swiftkv.errors import SwiftKVError

app = typer.Typer(
    help="Distill an LLM into a SwiftKV model, publish it, serve it and measure it, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
MODELS: list[Callable[..., None]] = [profile, distill, evaluate, publish, promote, rollback, export_snowflake]
FLEETS: list[Callable[..., None]] = [serve, deploy, top, usage, key, down]
for command in MODELS + FLEETS:
    app.command()(command)
app.add_typer(delta_app, name="delta")
app.add_typer(models_app, name="models")
app.add_typer(node_app, name="node")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; exit status 2 for what the user can mend, 130 for Ctrl-C."""
    keep_caches_at_home()
    # A closed terminal or a supervisor's SIGTERM means the same: leave no cluster behind. (nohup's SIG_IGN stays.)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        app()
    except SwiftKVError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
