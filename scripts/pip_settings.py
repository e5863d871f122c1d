"""Reads this machine's pip settings; run as a program, passes them on to a chroot.

The program writes the pip.conf named on its command line and prints the local paths that the settings name, as
`file PATH` or `folder PATH` a line. Changes no setting.
Called by: lock.py, ci_chroot.sh. Calls: pip.
"""

import ast
import subprocess
import sys
from pathlib import Path


def read_pip_settings(python: Path) -> dict[str, str]:
    """pip's settings by bare name (`index-url`, `cert`, …); what the environment sets wins over files."""
    command = [str(python), "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    settings = {}
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def find_local_paths(settings: dict[str, str]) -> list[Path]:
    """The files and folders on this machine that the settings point at.

    An index (`file:///a/simple`) usually points at wheels beside it, so its parent folder is taken.
    """
    found = set()
    for name, value in settings.items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                found.add(path.parent if name.endswith("index-url") else path)
    return sorted(found)


def main() -> None:
    """Writes the file named on the command line."""
    settings = read_pip_settings(Path(sys.executable))
    continuation = "\n    "
    lines = [f"{name} = {continuation.join(value.split())}\n" for name, value in settings.items()]
    Path(sys.argv[1]).write_text("[global]\n" + "".join(lines))
    for path in find_local_paths(settings):
        print("folder" if path.is_dir() else "file", path)


if __name__ == "__main__":
    main()
