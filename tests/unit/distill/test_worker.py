"""What a worker tells of its checkpoints."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_teacher
from ranks import build_recipe, build_rows

from swiftkv.distill import records, worker
from swiftkv.distill.loop import Training


def test_what_training_waits_for_a_checkpoint_is_recorded_once_and_without_the_step_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[str, float, dict[str, Any]]] = []
    monkeypatch.setattr(records, "observe", lambda name, value, **labels: recorded.append((name, value, labels)))
    monkeypatch.setattr(worker, "_report", lambda *_: time.sleep(0.3))
    recipe = build_recipe(write_teacher(tmp_path / "teacher"))
    training = Training(worker.build_step(recipe), recipe, build_rows())
    surroundings = worker._Worker(training, recipe, tmp_path / "run", tmp_path / "scratch", num_restarts=0)
    surroundings.hand_over()
    assert recorded == [], "nothing was begun"
    started = time.monotonic()
    surroundings.save(torch.zeros(1, training.curve.shape[1], dtype=torch.float64))
    saved_s = time.monotonic() - started
    time.sleep(0.5)  # the next step's gradients
    started = time.monotonic()
    surroundings.hand_over()
    waited_s = saved_s + time.monotonic() - started
    surroundings.hand_over()
    surroundings.close()
    assert waited_s > 0.3
    assert recorded == [("swiftkv_distill_checkpoint_seconds", pytest.approx(waited_s, abs=0.05), {"run": "run"})]
