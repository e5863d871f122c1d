"""What was measured of a version after it was published, and whether it may be promoted.

A manifest never changes, so later measurements are objects beside it, each written once and bound to the digest of the
bytes that were measured. The newest gate's result decides, whether the manifest holds it or one of these.
Measures nothing (evaluate/).
Called by: registry/registry.py, evaluate/gates.py, cli. Calls: registry/storage.py.
"""

from datetime import UTC, datetime
from typing import Literal

from pydantic import ConfigDict, JsonValue, ValidationError

from swiftkv.config import StrictModel
from swiftkv.errors import IntegrityError, RegistryError
from swiftkv.registry import layout
from swiftkv.registry.manifest import Manifest, describe_code, describe_publisher
from swiftkv.registry.storage import Storage


class LimitResult(StrictModel):
    """One limit of a gate, and what was found."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    limit: str
    """What the gate's file says, and why it cannot be kept where the figures do not decide it."""
    found: float | None
    """None: it was not measured, which does not pass."""
    passed: bool


class GateResult(StrictModel):
    """How a version did at a gate."""

    gate: str
    """The gate's name."""
    sha256: str
    """Of the gate's settings."""
    passed: bool
    limits: tuple[LimitResult, ...]


class EvaluationRecord(StrictModel):
    """One evaluation of a published version."""

    # As in the manifest: a figure that is not a number must stay visible.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: Literal[1] = 1
    digest: str
    """Of the version that was measured."""
    evaluated_at: datetime
    evaluated_by: str
    """user@host."""
    code_version: str
    figures: dict[str, JsonValue]
    """Results, seeds, versions of what measured, and its own output."""
    gate: GateResult | None = None


def add_evaluation(
    storage: Storage, manifest: Manifest, figures: dict[str, JsonValue], gate: GateResult | None
) -> EvaluationRecord:
    """Keep figures beside the version."""
    record = EvaluationRecord(
        digest=manifest.digest,
        evaluated_at=datetime.now(UTC),
        evaluated_by=describe_publisher(),
        code_version=describe_code(),
        figures=figures,
        gate=gate,
    )
    path = f"{layout.evaluations_path(manifest.name, manifest.version)}/{layout.build_id()}.json"
    storage.create(path, record.model_dump_json(indent=1).encode() + b"\n")
    return record


def list_evaluations(storage: Storage, manifest: Manifest) -> list[EvaluationRecord]:
    """Evaluations of the version, oldest first.

    Raises: IntegrityError if one is damaged, or was made of other bytes.
    """
    folder = layout.evaluations_path(manifest.name, manifest.version)
    records = []
    for name in sorted(storage.list_files(folder)):
        content = storage.read(f"{folder}/{name}")
        try:
            record = EvaluationRecord.model_validate_json(content or b"")
        except ValidationError as error:
            raise IntegrityError(f"{folder}/{name}: damaged ({error.errors()[0]['msg']}). Remove it.") from None
        if record.digest != manifest.digest:
            raise IntegrityError(f"{folder}/{name}: an evaluation of other bytes than the version's. Remove it.")
        records.append(record)
    return sorted(records, key=lambda record: record.evaluated_at)


def find_gate(storage: Storage, manifest: Manifest) -> GateResult | None:
    """The newest result of a gate, None if the version was put to none."""
    for record in reversed(list_evaluations(storage, manifest)):
        if record.gate is not None:
            return record.gate
    kept = (manifest.evaluation or {}).get("gate")
    try:
        return None if kept is None else GateResult.model_validate(kept)
    except ValidationError:
        raise IntegrityError(
            f"{manifest.name}@{manifest.version}: the manifest's evaluation.gate is not a gate's result. "
            "Evaluate the version again."
        ) from None


def require_gate(storage: Storage, manifest: Manifest) -> None:
    """Raises: RegistryError saying which limits were missed, unless the newest gate was passed."""
    reference = f"{manifest.name}@{manifest.version}"
    result = find_gate(storage, manifest)
    if result is None:
        raise RegistryError(
            f"{reference} was put to no gate. Run `swiftkv evaluate {reference} --data … --gate GATE.yaml`, or "
            'promote it with --force "why".'
        )
    if not result.passed:
        missed = "; ".join(f"{limit.limit} (found {limit.found})" for limit in result.limits if not limit.passed)
        raise RegistryError(
            f"{reference} did not pass the gate {result.gate!r}: {missed}. Distill it better, or promote it with "
            '--force "why".'
        )
