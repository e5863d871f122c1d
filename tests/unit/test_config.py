"""What is said of wrong settings, whatever room they belong to."""

from typing import Annotated

import pytest
from pydantic import Field

from swiftkv.config import StrictModel, parse_settings, parse_yaml
from swiftkv.errors import ConfigError


class Shelf(StrictModel):
    height_m: float = Field(default=1, gt=0)
    """Metres. A shelf of none would be a board."""
    books: list[Annotated[str, Field(min_length=1)]] = []  # noqa: RUF012  # pydantic copies defaults
    """Their titles."""
    pin: int = Field(default=0, repr=False)
    """Of its lock."""


class Library(StrictModel):
    shelves: dict[str, Shelf] = {}  # noqa: RUF012
    rooms: list[list[Shelf | None]] = []  # noqa: RUF012
    best: Shelf | None = None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"shelves": {"height_m": {"heigth_m": 2}}},
            "shelves.height_m.heigth_m: unknown key. Nearest: height_m. Allowed here: books, height_m, pin.",
        ),
        (
            {"rooms": [[{"hight": 2}]]},
            "rooms.0.0.hight: unknown key. Nearest: height_m. Allowed here: books, height_m, pin.",
        ),
        ({"best": {"xyz": 2}}, "best.xyz: unknown key. Allowed here: books, height_m, pin."),
        ({"best": {"height_m": 0}}, "best.height_m: should be greater than 0 (given: 0). Meaning: Metres."),
        ({"best": {"height_m": "2 m"}}, "best.height_m: should be a number (given: '2 m'). Meaning: Metres."),
        (
            {"best": {"books": [7]}},
            "best.books.0: should be text; write it in quotes (given: 7). Meaning: Their titles.",
        ),
        ({"best": {"books": {}}}, "best.books: should be a list. Meaning: Their titles."),
        ({"best": {"pin": "12 34"}}, "best.pin: should be a whole number. Meaning: Of its lock."),
        ({"best": 1}, "best: should be a mapping of settings (given: 1)."),
    ],
)
def test_key_and_what_belongs_there_are_named(given, said):
    with pytest.raises(ConfigError) as raised:
        parse_settings(given, Library, "library.yaml")
    assert str(raised.value) == f"library.yaml:\n  {said}"


def test_key_that_is_there_twice_is_refused_and_one_of_an_anchor_is_not():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: *a", "test") == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 1}}
    with pytest.raises(ConfigError, match="test: not valid YAML in line 3, column 4: x is there twice; keep one."):
        parse_yaml("b:\n   x: 1\n   x: 2", "test")
