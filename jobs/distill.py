"""Distill a SwiftKV student from a teacher, as a Ray job.

    swiftkv distill jobs/recipes/NAME.yaml --output runs/NAME
    ray job submit --working-dir . -- python jobs/distill.py RECIPE --output FOLDER      # paths that every node can see

The recipe is checked before anything heavy is imported. `--dry-run` prints it resolved and ends.
Calls: swiftkv/distill/run.py.
"""

import argparse
import sys
from pathlib import Path

import yaml

from swiftkv.config import keep_caches_at_home
from swiftkv.distill.recipe import Recipe, load_recipe, parse_overrides
from swiftkv.errors import ConfigError, SwiftKVError


def main() -> int:
    """Exit status of the job: 0, or 2 with one error message on standard error."""
    arguments = _parse_arguments()
    keep_caches_at_home()
    try:
        _check_arguments(arguments)
        if arguments.stop:
            request_stop(arguments.stop.absolute())
        elif arguments.resume:
            from swiftkv.distill.folder import STOP_FILE

            (arguments.resume / STOP_FILE).unlink(missing_ok=True)  # of the time before: here, before anything slow
            run(None, arguments.resume.absolute())
        else:
            recipe = load_recipe(arguments.recipe, parse_overrides(arguments.set))
            if arguments.dry_run:
                print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
            else:
                run(recipe, (arguments.output or Path("runs") / arguments.recipe.stem).absolute())
    except SwiftKVError as error:
        # One block, which `swiftkv distill` finds again among what Ray writes into the job's log.
        print("error: " + str(error).replace("\n", "\n  "), file=sys.stderr, flush=True)
        return 2
    return 0


def run(recipe: Recipe | None, run_folder: Path) -> None:
    """Start the recipe's run, or go on with the folder's, on the cluster that this process belongs to."""
    from swiftkv.distill.run import resume_run, start_run

    ending = start_run(recipe, run_folder) if recipe is not None else resume_run(run_folder)
    if ending.kind == "finished":
        print(f"distilled: {run_folder / 'final'}")
    else:
        print(f"stopped: after step {ending.steps_done}; go on with: swiftkv distill --resume {run_folder}")


def request_stop(run_folder: Path) -> None:
    """Ask the folder's run to save a checkpoint at its next step and end."""
    from swiftkv.distill.folder import request_stop

    request_stop(run_folder)
    print(f"asked: the run in {run_folder} saves a checkpoint at its next step and ends")


def _check_arguments(arguments: argparse.Namespace) -> None:
    if sum(choice is not None for choice in (arguments.recipe, arguments.resume, arguments.stop)) != 1:
        raise ConfigError("give one of: a recipe (see jobs/recipes/), --resume FOLDER or --stop FOLDER.")
    if arguments.recipe is None and (arguments.set or arguments.output or arguments.dry_run):
        raise ConfigError("--set, --output and --dry-run belong to a recipe; a run that has begun keeps its own.")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", help="YAML file, see jobs/recipes/")
    parser.add_argument("--output", type=Path, help="folder of the run; default: runs/<name of the recipe>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and end")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    parser.add_argument("--stop", type=Path, metavar="FOLDER", help="ask the run in this folder to save and end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
