"""Distill a SwiftKV student from a teacher, as a Ray job.

    swiftkv distill jobs/recipes/NAME.yaml --output runs/NAME
    ray job submit -- python jobs/distill.py RECIPE --output FOLDER      # paths that every node can see

The recipe is checked before anything heavy is imported. `--dry-run` prints it resolved and ends.
Calls: swiftkv/distill/loop.py.
"""

import argparse
import sys
from pathlib import Path

import yaml

from swiftkv.distill.recipe import Recipe, load_recipe, parse_overrides
from swiftkv.errors import SwiftKVError


def main() -> int:
    """Exit status of the job: 0, or 2 with one error message on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, see jobs/recipes/")
    parser.add_argument("--output", type=Path, help="folder of the run; default: runs/<name of the recipe>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and end")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, parse_overrides(arguments.set))
        if arguments.dry_run:
            print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        else:
            run(recipe, (arguments.output or Path("runs") / arguments.recipe.stem).absolute())
    except SwiftKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(recipe: Recipe, output: Path) -> None:
    """Run on the cluster that this process belongs to."""
    from swiftkv.distill.loop import run_distillation

    final = run_distillation(recipe, output)
    print(f"distilled: {final}")


if __name__ == "__main__":
    sys.exit(main())
