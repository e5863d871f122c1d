"""Words that mean a version, such as production: moved by compare-and-swap, every move kept.

The moves of an alias are a chain: each says which version it found. `rollback` goes back to what was promoted before
the present one; rolling back again goes one further.
Called by: registry/registry.py. Calls: registry/storage.py.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from pydantic import ValidationError

from swiftkv.config import StrictModel
from swiftkv.errors import IntegrityError, RegistryError, VersionNotFoundError
from swiftkv.registry import layout
from swiftkv.registry.layout import build_id
from swiftkv.registry.manifest import describe_publisher
from swiftkv.registry.storage import Storage


class Move(StrictModel):
    """One change of an alias."""

    id: str
    """Of this move alone."""
    version: str
    previous: str | None
    """What the alias meant before; None: it was new."""
    action: Literal["set", "rollback"]
    moved_at: datetime
    """UTC."""
    moved_by: str
    """user@host."""
    forced: str | None = None
    """Why a gate that had not passed was passed over."""


class AliasRecord(StrictModel):
    """The object of an alias."""

    format: Literal[2] = 2
    version: str
    history: tuple[Move, ...]
    """Oldest first."""

    @property
    def promoted(self) -> list[str]:
        """Versions that rollbacks lead back to, the present one last."""
        stack: list[str] = []
        for move in self.history:
            if move.action == "set" and (not stack or stack[-1] != move.version):
                stack.append(move.version)
            elif move.action == "rollback" and len(stack) > 1:
                stack.pop()
        return stack


def read_alias(storage: Storage, name: str, alias: str) -> AliasRecord | None:
    """The alias, None if there is none. Raises: IntegrityError if its object is damaged."""
    content = storage.read(layout.alias_path(name, alias))
    return None if content is None else parse_alias(content, name, alias)


def parse_alias(content: bytes, name: str, alias: str) -> AliasRecord:
    """The alias that its object holds. Raises: IntegrityError."""
    where = layout.alias_path(name, alias)
    try:
        record = AliasRecord.model_validate_json(content)
    except ValidationError:
        raise IntegrityError(f"{where} is damaged: {content[:100]!r}. Remove it, and set the alias again.") from None
    versions = [None, *(move.version for move in record.history)]
    if versions[-1] != record.version or versions[:-1] != [move.previous for move in record.history]:
        raise IntegrityError(f"{where} is damaged: its history is no chain. Remove it, and set the alias again.")
    return record


def move_alias(storage: Storage, name: str, alias: str, version: str, forced: str | None = None) -> None:
    """Make the alias mean `version`, whatever others do at the same moment."""
    _append(storage, name, alias, "set", lambda record: version, forced)


def roll_back(storage: Storage, name: str, alias: str) -> str:
    """Make the alias mean what was promoted before; that version.

    Raises: VersionNotFoundError if there is no such alias, nothing before, or it was removed.
    """

    def choose(record: AliasRecord | None) -> str:
        if record is None:
            raise VersionNotFoundError(f"{name!r} has no alias {alias!r}. Set one with `swiftkv promote`.")
        if len(record.promoted) < 2:
            raise VersionNotFoundError(
                f"{name}@{alias} has meant {record.version} from the start: there is nothing before it to go back to."
            )
        version = record.promoted[-2]
        if storage.find_size(layout.manifest_path(name, version)) is None:
            raise VersionNotFoundError(
                f"{name}@{alias} meant {version} before, which `swiftkv models gc` removed. Promote another version."
            )
        return version

    return _append(storage, name, alias, "rollback", choose, None)


def _append(
    storage: Storage,
    name: str,
    alias: str,
    action: Literal["set", "rollback"],
    choose: Callable[[AliasRecord | None], str],
    forced: str | None,
) -> str:
    """The version that was chosen, now the alias's; `choose` is asked again if others were first."""
    chosen, move_id = "", build_id()

    def append(content: bytes | None) -> bytes:
        nonlocal chosen
        record = None if content is None else parse_alias(content, name, alias)
        if content is not None and _holds(record, move_id):
            return content  # a request whose answer was lost, and that the client repeated
        chosen = choose(record)
        move = Move(
            id=move_id,
            version=chosen,
            previous=None if record is None else record.version,
            action=action,
            moved_at=datetime.now(UTC),
            moved_by=describe_publisher(),
            forced=forced,
        )
        history = (*(() if record is None else record.history), move)
        return json.dumps(AliasRecord(version=chosen, history=history).model_dump(mode="json"), indent=1).encode()

    try:
        storage.swap(layout.alias_path(name, alias), append)
    except RegistryError:
        if not _holds(read_alias(storage, name, alias), move_id):
            raise
    return chosen


def _holds(record: AliasRecord | None, move_id: str) -> bool:
    return record is not None and any(move.id == move_id for move in record.history)
