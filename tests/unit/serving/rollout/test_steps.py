"""Which step comes next, for everything that Serve and the registry may say."""

import itertools

import pytest

from swiftkv.serving.rollout.record import Record, Rejection
from swiftkv.serving.rollout.steps import Step, choose_step

REJECTED = Rejection(version="2", tag="t", reason="bad")


@pytest.mark.parametrize(
    ("record", "deployed", "step"),
    [
        (Record(), [], Step("add", "2")),  # the first version of all
        (Record(candidate="2"), ["2"], Step("bring_up", "2")),
        (Record(stable="2"), ["2"], Step("rest")),
        (Record(stable="1"), ["1"], Step("add", "2")),
        (Record(stable="1", candidate="2"), ["1"], Step("add", "2")),  # somebody removed it
        (Record(stable="1", candidate="2"), ["1", "2"], Step("bring_up", "2")),
        (Record(stable="1", candidate="2", share=0.1), ["1", "2"], Step("watch", "2")),
        (Record(stable="2"), ["1", "2"], Step("remove", "1")),
        # The alias moved on, or back, while another version was watched.
        (Record(stable="1", candidate="3", share=0.1), ["1", "3"], Step("abandon", "3")),
        (Record(stable="2", candidate="3", share=0.1), ["2", "3"], Step("abandon", "3")),
        (Record(stable="1"), ["1", "3"], Step("remove", "3")),  # never a third beside two
        (Record(stable="3"), ["2", "3"], Step("add", "2")),  # back to one that still runs: it is not removed first
        # A version that was rejected.
        (Record(stable="1", rejected=REJECTED), ["1", "2"], Step("remove", "2")),
        (Record(stable="1", rejected=REJECTED), ["1"], Step("rest")),
        (Record(stable="1", rejected=Rejection(version="2", tag="before", reason="bad")), ["1"], Step("add", "2")),
        (Record(rejected=REJECTED), [], Step("rest")),  # nothing to fall back on: the alias must move
        # The stable version's application is gone.
        (Record(stable="1"), [], Step("forget", "1")),
        (Record(candidate="1", rejected=REJECTED), [], Step("add", "1")),
        (Record(), ["2"], Step("add", "2")),
    ],
)
def test_next_step(record, deployed, step):
    assert choose_step(record, "2", "t", deployed) == step


def test_stable_version_is_never_removed_and_never_a_third_added():
    versions = [None, "1", "2", "3"]
    for stable, candidate, alias in itertools.product(versions, versions, versions[1:]):
        if stable is not None and stable == candidate:
            continue
        record = Record(stable=stable, candidate=candidate, share=0.1 if stable and candidate else 0)
        for size in range(4):
            for deployed in itertools.combinations(versions[1:], size):
                step = choose_step(record, alias, "t", deployed)
                assert step.kind != "remove" or step.version not in (stable, candidate, alias)
                if step.kind == "add":
                    assert len({*deployed, step.version}) <= 2 or candidate == step.version
