"""Pages that are made from code are what the code makes, and leave nothing undescribed."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import BaseModel, Field
from site_pages import DOCS, SCRIPTS

from swiftkv.config import StrictModel
from swiftkv.metrics import METRICS
from swiftkv.metrics.foreign import FOREIGN

sys.path.insert(0, str(SCRIPTS))

from pages import api, commands, references, run_books, settings
from pages.docstrings_text import separate_signs
from pages.markdown import build_table, escape
from pages.write import build_files, find_differences

FILES = build_files()


def test_the_files_are_what_the_code_makes() -> None:
    assert find_differences() == [], "run `make references`"


@pytest.mark.parametrize("path", FILES)
def test_the_file_is_what_the_code_makes_byte_for_byte(path: str) -> None:
    assert (DOCS / path).read_bytes() == FILES[path].encode(), "run `make references`"


ROOTS = [root for page in references.PAGES.values() for root in page.roots]
CLASSES = list({found: None for root in ROOTS for found in settings._find_classes(root)})


@pytest.mark.parametrize("settings_class", CLASSES, ids=lambda found: found.__qualname__)
def test_every_key_is_described(settings_class: type[BaseModel]) -> None:
    for name, field in settings_class.model_fields.items():
        assert settings.describe_meaning(field), f"{settings_class.__name__}.{name} has no docstring"
        assert "`typing" not in settings.describe_type(field.annotation), name


def test_every_class_of_settings_has_a_section_that_its_links_reach() -> None:
    for name in references.PAGES:
        text = FILES[f"reference/{name}.md"]
        headings = set(re.findall(r"^## (\w+)$", text, flags=re.MULTILINE))
        linked = set(re.findall(r"\[(\w+)\]\(#\w+\)", text))
        assert linked <= headings


def test_a_key_s_type_bounds_unit_and_default_are_told() -> None:
    class Inner(StrictModel):
        """What is inside. More of it."""

        wait_s: float = Field(default=1.5, gt=0, le=9)
        """Seconds | until then."""

    class Outer(StrictModel):
        """All of it."""

        inner: list[Inner] = Field(default=[])
        name: str = Field(pattern="^a+$")
        """Given by *hand*."""
        way: Inner | None = None
        """One way."""

    text = settings.build_sections(Outer)
    assert "| `inner` | list of [Inner](#inner) | `[]` | What is inside. More of it. |" in text
    assert "| `name` | text<br>like `^a+$` | **required** | Given by \\*hand\\*. |" in text
    assert "| `way` | [Inner](#inner) or `null` | `null` | One way. |" in text
    assert "What is inside. More of it. At `inner[]`, `way`." in text
    assert "| `wait_s` | number<br>> 0, ≤ 9, s | `1.5` | Seconds \\| until then. |" in text


def test_every_command_and_option_is_there() -> None:
    page = FILES["reference/commands.md"]
    for words, command in commands.list_commands().items():
        section = page.partition(f"## swiftkv {words}\n")[2].partition("\n## ")[0]
        assert section, words
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(f"`{name}`" in section for name in parameter.opts), (words, parameter.name)


def test_every_metric_is_there() -> None:
    page = FILES["reference/metrics.md"]
    for metric in [*METRICS.values(), *FOREIGN.values()]:
        assert page.count(f"| `{metric.exported_name}` |") == 1, metric.exported_name


def test_every_alert_has_its_run_book() -> None:
    page = FILES["alerts.md"]
    for alert in run_books.load_rules().ALERTS:
        section = page.partition(f"## {alert.name}\n")[2].partition("\n## ")[0]
        assert f"**What to do.** {escape(alert.run_book)}" in section
        assert alert.expr in section
    assert "$labels" not in page and "$value" not in page


def test_every_module_is_on_a_page_of_the_api() -> None:
    package = Path(api._PACKAGE)
    shown = {
        name
        for path, text in FILES.items()
        if path.startswith("api/")
        for name in re.findall(r"^::: (\S+)$", text, re.M)
    }
    expected = set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] not in api.NOT_SHOWN and not parts[-1].startswith("_"):
            expected.add(".".join(("swiftkv", *parts)))
    assert expected - shown == set()


def test_the_picture_is_svg_with_a_title_and_no_box_over_another() -> None:
    root = ElementTree.fromstring(FILES["journey.svg"])
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title") is not None
    boxes = [
        {key: float(rect.get(key, 0)) for key in ("x", "y", "width", "height")} for rect in root.iter(f"{space}rect")
    ]
    _, *boxes = boxes  # the first is the ground
    for number, one in enumerate(boxes):
        assert one["x"] + one["width"] <= float(root.get("width")) and one["y"] + one["height"] <= float(
            root.get("height")
        )
        for other in boxes[number + 1 :]:
            beside = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            assert beside or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    assert escape("runs/<recipe>, `a<b>`\n  and [x]*") == "runs/&lt;recipe&gt;, `a<b>` and \\[x\\]\\*"
    assert build_table(("a", "b"), [("x | y", "z")]).splitlines()[-1] == "| x \\| y | z |"


def test_signs_of_docstrings_begin_paragraphs() -> None:
    text = "Computes.\nShapes: [B].\nRaises: it: never\n  Raises: inside"
    assert separate_signs(text) == "Computes.\n\n**Shapes:** [B].\n\n**Raises:** it: never\n  Raises: inside"
