"""What a failed deployment tells, taken from logs as vLLM and Ray write them."""

from swiftkv.serving.deploy import find_engine_errors

REPLICA_LOG = """\
(ServeReplica:pool:LLMServer:tiny pid=12) Traceback (most recent call last):
  File "engine.py", line 1, in start
RuntimeError: Failed to create vLLM engine config: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (4096) is greater than the derived max_model_len (512). [type=value]
    For further information visit a page
"""
ENGINE_LOG = """\
(EngineCore pid=13) ERROR 11-21 04:30:42 [core.py:1100] Traceback (most recent call last):
(EngineCore pid=13) ERROR 11-21 04:30:42 [core.py:1100]   File "core.py", line 2, in run
(EngineCore pid=13) ERROR 11-21 04:30:42 [core.py:1100] ValueError: No available memory for the cache blocks.
(EngineCore pid=13) ERROR 11-21 04:30:43 [core.py:1101] ValueError: No available memory for the cache blocks.
(EngineCore pid=13) INFO 11-21 04:30:44 [core.py:1102] all is well
"""


def write_logs(folder, **texts):
    logs = folder / "r" / "session_1" / "logs"
    logs.mkdir(parents=True)
    for name, text in texts.items():
        (logs / f"worker-{name}.err").write_text(text)


def test_cause_that_only_the_engine_s_process_wrote_is_found_once(tmp_path):
    write_logs(tmp_path, engine=ENGINE_LOG)
    assert find_engine_errors(tmp_path) == ["ValueError: No available memory for the cache blocks."]


def test_settings_error_keeps_its_reason(tmp_path):
    write_logs(tmp_path, replica=REPLICA_LOG)
    (error,) = find_engine_errors(tmp_path)
    assert error.startswith("RuntimeError: Failed to create vLLM engine config")
    assert "max_model_len (4096) is greater than the derived max_model_len (512)" in error
