"""A Griffe extension: each sign of our docstrings (`Shapes:`, `Raises:`, `Called by:`, …) begins a paragraph.

The docstrings are prose without another markup; Griffe's own styles would take these lines for sections of a list.
Called by: mkdocstrings, as mkdocs.yml says.
"""

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pages.docstrings_text import separate_signs


class Signs(griffe.Extension):
    """Rewrites docstrings before they are shown."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Griffe's hook for every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = separate_signs(obj.docstring.value)
