"""A teacher's profile against the reference and against the students that it stands for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import write_teacher
from reference import compute_hidden_states, load_weights
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.distill.profiling import CutCost, TeacherProfile, list_cuts, profile_teacher
from swiftkv.errors import ConfigError
from swiftkv.model.convert import convert_teacher

ROWS = np.random.default_rng(0).integers(0, 256, (3, 40), dtype=np.int32)
CUTS = [(2, 1), (2, 2), (2, 4), (3, 1), (3, 3), (5, 1)]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"), family=request.param)


@pytest.fixture(scope="module")
def found(teacher: Path) -> TeacherProfile:
    specs = [list_cuts(teacher, [kept], [group_size])[0] for kept, group_size in CUTS]
    return profile_teacher(teacher, ROWS, specs, lambda _: None)


def test_each_cut_costs_what_its_own_student_costs(teacher: Path, found: TeacherProfile) -> None:
    assert [(cut.num_key_value_layers, cut.key_value_group_size) for cut in found.cuts] == CUTS
    for cut, (kept, group_size) in zip(found.cuts, CUTS, strict=True):
        logits = [
            _compute_logits(convert_teacher(teacher, kept, group_size), is_teacher) for is_teacher in (False, True)
        ]
        student, expected = (torch.log_softmax(entry, -1) for entry in logits)
        kl = (expected.exp() * (expected - student)).sum(-1).mean()
        assert cut.kl_nats == pytest.approx(float(kl), abs=2e-6)
        assert cut.agreement_frac == pytest.approx(
            float((student.argmax(-1) == expected.argmax(-1)).float().mean()), abs=1e-6
        )
        assert cut.skipped_frac == pytest.approx((6 - kept) / 6, abs=1e-4)
    assert len({cut.kl_nats for cut in found.cuts}) == len(CUTS)


def test_similarity_is_that_of_the_references_hidden_states(teacher: Path, found: TeacherProfile) -> None:
    config, weights = load_weights(teacher)
    states = [torch.stack(compute_hidden_states(config, weights, row.tolist(), "teacher")) for row in ROWS]
    successive = [torch.cosine_similarity(entry[:-1], entry[1:], dim=-1).mean(-1) for entry in states]
    assert found.state_similarity == pytest.approx(torch.stack(successive).mean(0).tolist(), abs=1e-5)
    later = [
        [torch.cosine_similarity(entry[i], entry[j], dim=-1).mean() for j in range(i + 1, 7)]
        for i in range(6)
        for entry in states
    ]
    means = torch.tensor([torch.stack(row).mean() for row in later]).reshape(6, len(states)).mean(1)
    assert found.later_similarity == pytest.approx(means.tolist(), abs=1e-5)


def test_the_recommended_cut_saves_most_within_the_limit() -> None:
    costs = [(2, 1, 3.0, 1.0, 0.3), (3, 2, 1.9, 0.75, 0.04), (3, 1, 1.9, 1.0, 0.02), (4, 1, 1.4, 1.0, 0.01)]
    cuts = [CutCost(kept, size, 1 - kept / 6, speedup, kv, kl, 0.9) for kept, size, speedup, kv, kl in costs]
    found = TeacherProfile(100, [1.0], [1.0], cuts)
    assert found.recommend(0.05) == cuts[1]  # of equal FLOPs the one with less KV
    assert found.recommend(0.03) == cuts[2]
    assert found.recommend(1.0) == cuts[0]
    assert found.recommend(0.001) is None


def test_group_sizes_are_used_where_they_fit_and_cuts_that_do_not_are_refused_by_name(teacher: Path) -> None:
    found = {(s.num_key_value_layers, s.key_value_group_size) for s in list_cuts(teacher, None, [1, 3])}
    assert found == {(2, 1), (3, 1), (3, 3), (4, 1)}
    assert len(list_cuts(teacher, [3, 4], [1, 2])) == 3
    for kept, sizes, message in (
        ([9], [1], "of the teacher's 6"),
        ([6], [1], "1 to 5"),
        ([3], [2], "none of 2 divides"),
    ):
        with pytest.raises(ConfigError, match=message):
            list_cuts(teacher, kept, sizes)
    with pytest.raises(ConfigError, match="none divides the later layers of any cut"):
        list_cuts(teacher, None, [5])


def test_the_command_prints_a_table_and_writes_a_picture(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "the quick brown fox " * 60}) + "\n")
    arguments = ["profile", str(teacher), "--data", str(tmp_path / "prompts.jsonl"), "--row-tokens", "32"]
    result = CliRunner().invoke(app, [*arguments, "--group-sizes", "1,2", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "KL (nats)" in result.output
    figures = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert len(figures["state_similarity"]) == 6 and figures["cuts"]
    assert (tmp_path / "out" / "profile.png").stat().st_size > 10_000
    file = tmp_path / "prompts.jsonl"
    for wrong in (["--cuts", "three"], ["--group-sizes", "0"], ["--row-tokens", "4096"], ["--output", str(file)]):
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(refused.exception, ConfigError)
        assert (wrong[0] if wrong[1] != str(file) else "not a folder") in str(refused.exception)


def _compute_logits(model: object, is_teacher: bool) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(ROWS.astype(np.int64)), teacher=is_teacher).logits
