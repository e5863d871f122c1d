"""What the serving bench makes of answers and arguments; the loads themselves need engines."""

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from swiftkv.bench.serve.flood import Flood
from swiftkv.bench.serve.run import Plan
from swiftkv.bench.serve.servers import list_options
from swiftkv.bench.serve.tokens import Expected, count_differences, draw_prompts
from swiftkv.engine.settings import EngineSettings


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
    assert {request.label for request in flood.build_requests(4)} == {"chat", "long"}


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
