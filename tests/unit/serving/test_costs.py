"""What an engine's ledger has grown by is counted, once."""

import json
import os
from collections import Counter

import pytest

from swiftkv.engine.scheduler_names import FILE_KEY
from swiftkv.serving import costs as module
from swiftkv.serving.costs import CostReader


@pytest.fixture
def counted(monkeypatch):
    found = Counter()
    monkeypatch.setattr(module, "count", lambda name, amount, **labels: found.update({tuple(labels.values()): amount}))
    return found


def test_growth_is_counted_once_and_a_file_that_is_not_there_is_nothing(counted, monkeypatch):
    monkeypatch.setenv(FILE_KEY, "another engine's")
    reader = CostReader()
    reader.read()
    assert counted == {}
    first = {"seconds": [["a", "prefill", 1.5]]}  # of a model whose FLOPs nobody knows
    second = {
        "seconds": [["a", "prefill", 2.0], ["-", "idle", 4.0]],
        "unmodified_seconds": [["a", 3.5]],
        "device_flops": [["prefill", "executed", 1e9], ["prefill", "unmodified", 2e9]],
    }
    for rows in (first, second):
        with open(os.environ[FILE_KEY], "w") as file:
            json.dump(rows, file)
        reader.read()
        reader.read()
    assert counted == {
        ("a", "prefill"): 2.0,
        ("-", "idle"): 4.0,
        ("a",): 3.5,
        ("prefill", "executed"): 1e9,
        ("prefill", "unmodified"): 2e9,
    }
