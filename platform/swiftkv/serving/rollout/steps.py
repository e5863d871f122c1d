"""What is to be done next, from what the registry's alias says, what is remembered, and which applications there are.

Pure: the same input gives the same step, so it does not matter which replica looks, or whether one was killed.
Called by: rollout/rollout.py.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from swiftkv.serving.rollout.record import Record

Kind = Literal["add", "bring_up", "watch", "abandon", "forget", "remove", "rest"]


@dataclass(frozen=True)
class Step:
    """One step, and the version that it is about.

    add: verify it and deploy its application. bring_up: wait until that runs, warm it, let it have requests.
    watch: compare it with the stable one. abandon: drop it, because the alias names another.
    forget: the stable version's application is gone, begin anew. remove: nobody needs its application any more.
    """

    kind: Kind
    version: str = ""


def choose_step(record: Record, alias_version: str, alias_tag: str, deployed: Collection[str]) -> Step:
    """The next step. `deployed`: the versions that have an application, whatever its state."""
    if record.stable is not None and record.stable not in deployed:
        return Step("forget", record.stable)
    target: str | None = alias_version
    if record.rejects(alias_version, alias_tag):
        target = record.stable or record.candidate
    if record.candidate is not None and record.candidate != target:
        return Step("abandon", record.candidate)
    unused = sorted(set(deployed) - {record.stable, record.candidate, target})
    if record.candidate is None and unused:
        # Never more than two at once: what is left of the last rollout goes before the next begins.
        return Step("remove", unused[0])
    if target is None or target == record.stable:
        return Step("rest")
    if target not in deployed or record.candidate is None:
        return Step("add", target)
    return Step("watch" if record.share else "bring_up", target)
