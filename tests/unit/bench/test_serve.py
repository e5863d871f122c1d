"""What the serving bench makes of answers and arguments; the loads themselves need engines."""

import json
from pathlib import Path

from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from swiftkv.bench.serve.flood import CHAT_ROOM_TOKENS, Chunking, Flood, Outcome, choose_best
from swiftkv.bench.serve.run import Plan
from swiftkv.bench.serve.servers import list_options
from swiftkv.bench.serve.tokens import Expected, count_differences, draw_prompts
from swiftkv.cli.bench import bench_app
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import ConfigError


def test_only_differences_that_rounding_cannot_explain_count():
    expected = [Expected([1, 2, 3], [0.5, 0.5, 0.5]), Expected([1, 2, 3], [0.5, 0.01, 0.5]), Expected([1, 2], [1, 1])]
    answers = [[1, 9, 9], [1, 9, 9], [1, 2]]
    assert count_differences(answers, expected, 0.02) == 1  # the second differs first where two tokens are close
    assert count_differences(answers, expected, 0.0) == 2


def test_prompts_are_of_all_lengths():
    lengths = [len(prompt) for prompt in draw_prompts(512)]
    assert len(lengths) == 200
    assert min(lengths) < 5
    assert max(lengths) > 1000


def test_both_sides_of_a_flood_get_the_same_requests():
    flood = Flood(duration_s=30)
    assert flood.build_requests(4) == flood.build_requests(4)
    assert flood.build_requests(4) != flood.build_requests(5)
    assert [request.arrival_s for request in flood.build_requests(4) if request.label == "long"] == [1, 16]
    assert {request.label for request in flood.build_requests(4)} == {"chat", "long"}


def test_the_best_engine_of_a_flood_serves_chats_in_time():
    """The lowest TPOT may be that of an engine whose chats wait until the long prompts are done."""

    def outcome(tpot_s: float, ttft_s: float) -> Outcome:
        return Outcome(tpot_s, tpot_s, ttft_s, 1.0, 1.0)

    waiting, fast, slow = Chunking(64, False), Chunking(64, True), Chunking(128, True)
    assert choose_best({waiting: outcome(0.01, 9.0), fast: outcome(0.2, 0.5), slow: outcome(0.3, 0.4)}) == fast
    assert choose_best({waiting: outcome(0.01, 9.0), slow: outcome(0.3, 8.0)}) == waiting


def test_a_chunk_with_room_for_chats_leaves_it_in_the_step():
    settings = EngineSettings(max_num_batched_tokens=7)
    plain, roomy = (Chunking(64, has_room).apply(settings).build_engine_arguments() for has_room in (False, True))
    assert (plain["max_num_batched_tokens"], plain["long_prefill_token_threshold"]) == (64, 0)
    assert (roomy["max_num_batched_tokens"], roomy["long_prefill_token_threshold"]) == (64 + CHAT_ROOM_TOKENS, 64)


def test_settings_mean_the_same_on_vllm_s_command_line(tmp_path):
    settings = EngineSettings(dtype="float32", max_model_len=512, enable_prefix_caching=False, kv_transfer="producer")
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = settings.build_engine_arguments()
    parsed = EngineArgs.from_cli_args(parser.parse_args(["--model", str(tmp_path), *list_options(arguments)]))
    for name, value in arguments.items():
        found = getattr(parsed, name)
        if name == "kv_transfer_config":
            assert (found.kv_connector, found.kv_role) == (value["kv_connector"], value["kv_role"])
        else:
            assert found == value, name


def test_a_plan_has_one_core_for_each_engine_that_is_compared():
    settings = Plan().settings
    assert settings.cpu_cores == "0"
    assert not settings.enable_prefix_caching  # a prompt of the second round must cost what it cost in the first


def test_a_report_keeps_the_rows_of_earlier_runs_on_the_same_hardware(tmp_path: Path):
    command = ["serve", "--rows", "policy", "--report", str(tmp_path)]
    assert CliRunner().invoke(bench_app, command, catch_exceptions=False).exit_code == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    (policy,) = numbers["rows"]
    numbers["rows"] = [policy | {"row": "growth", "command": "an earlier one"}, policy | {"median": 1000.0}]
    (tmp_path / "numbers.json").write_text(json.dumps(numbers | {"growth_sizes": [1, 2, 1]}))
    assert CliRunner().invoke(bench_app, command, catch_exceptions=False).exit_code == 0
    kept = json.loads((tmp_path / "numbers.json").read_text())
    assert [entry["row"] for entry in kept["rows"]] == ["growth", "policy"]
    assert kept["rows"][1]["median"] < 1000 and kept["growth_sizes"] == [1, 2, 1]
    table = (tmp_path / "table.md").read_text()
    assert "an earlier one" in table and "requests lost" in table

    (tmp_path / "numbers.json").write_text(json.dumps(numbers | {"hardware": "an abacus"}))
    refused = CliRunner().invoke(bench_app, command)
    assert isinstance(refused.exception, ConfigError) and "an abacus" in str(refused.exception)
