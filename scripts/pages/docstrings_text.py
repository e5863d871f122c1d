"""What docstrings.py does with the text of a docstring; here, because it needs no Griffe.

Called by: docstrings.py.
"""

import re

SIGNS = ("Called by", "Calls", "Raises", "Read by", "Reads", "Returns", "Shapes", "Source", "Units")
_LINE = re.compile(rf"^({'|'.join(SIGNS)}):", re.MULTILINE)


def separate_signs(text: str) -> str:
    """The docstring with its signs in bold, each after an empty line."""
    return _LINE.sub(r"\n**\1:**", text)
