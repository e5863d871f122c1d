"""The registry's bench: a checkpoint that the registry takes, and every row measured with real tools."""

from swiftkv.bench.registry import MEMORY_ROW, ROWS, measure_registry, write_checkpoint
from swiftkv.registry.checks import check_checkpoint


def test_the_checkpoint_is_one_and_has_the_size(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", 3_000_000)
    assert check_checkpoint(folder)["num_key_value_layers"] == 1
    assert 3_000_000 <= sum(file.stat().st_size for file in folder.iterdir()) < 3_010_000


def test_every_row_is_measured():
    results, figures = measure_registry(2_000_000, 1, lambda text: None)
    assert [result.row for result in results] == [*ROWS.values(), MEMORY_ROW]
    assert all(result.ratio.median > 0 for result in results)
    assert figures["seconds"].keys() == ROWS.keys()
    assert 0.1 < results[-1].ratio.median < 2, "a Python process, and not its parent"
