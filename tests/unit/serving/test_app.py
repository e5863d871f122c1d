"""What a pool's settings become for Ray Serve LLM and vLLM."""

import json
import os

import httpx

from swiftkv.cluster.haproxy import NUM_PORTS, prepare_haproxy
from swiftkv.cluster.ports import choose_ports
from swiftkv.engine.settings import EngineSettings
from swiftkv.serving.config import PoolSettings
from swiftkv.serving.gateway.refusals import refuse
from swiftkv.serving.pools import configure_pool


def build_config(**changes):
    return configure_pool(PoolSettings(**{"model": "/models/tiny", "model_id": "tiny", **changes}))


def test_the_engine_s_settings_reach_vllm():
    engine = {"enforce_eager": True, "kv_cache_gib": 0.25, "max_model_len": 4096}
    config = build_config(engine=engine)
    assert EngineSettings(**engine).build_engine_arguments().items() <= config.engine_kwargs.items()
    assert config.engine_kwargs["kv_cache_memory_bytes"] == 2**28


def test_cached_tokens_are_told_and_tools_parsed_where_a_parser_is_named():
    told = build_config().get_engine_config().frontend_kwargs
    assert told == {"enable_prompt_tokens_details": True}
    parsed = build_config(tool_call_parser="hermes").get_engine_config().frontend_kwargs
    assert parsed == told | {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


def test_engine_with_cores_of_its_own_is_one_process_on_them():
    config = build_config(engine={"cpu_cores": "0,2-3"})
    environment = config.runtime_env["env_vars"]
    assert (environment["SWIFTKV_ENGINE_CORES"], environment["OMP_NUM_THREADS"]) == ("0,2,3", "3")
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert config.engine_kwargs["worker_cls"] == "swiftkv.engine.worker.Worker"


def test_engine_that_several_processes_share_is_bound_by_vllm():
    config = build_config(engine={"cpu_cores": "0|1", "tensor_parallel_size": 2})
    assert config.runtime_env["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert "worker_cls" not in config.engine_kwargs


def test_vllm_chooses_the_cores_of_one_replica():
    assert "VLLM_CPU_OMP_THREADS_BIND" not in build_config().runtime_env["env_vars"]


def test_replicas_of_one_machine_are_not_bound_to_the_same_cores():
    environment = build_config(num_replicas=2).runtime_env["env_vars"]
    assert "SWIFTKV_ENGINE_CORES" not in environment and "VLLM_CPU_OMP_THREADS_BIND" not in environment
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_pool_is_on_cpus_without_batching_and_with_a_bounded_queue():
    config = build_config(num_replicas=3, max_ongoing_requests=20)
    assert config.accelerator_config.kind == "cpu"
    assert config.experimental_configs["stream_batching_interval_ms"] == 0
    assert config.deployment_config["num_replicas"] == 3
    assert config.deployment_config["max_ongoing_requests"] == 20


def test_haproxy_starts_with_every_port_on_loopback(tmp_path):
    """The real program reads the configuration that the start script has made of Ray's."""
    import subprocess

    environment = prepare_haproxy(tmp_path, list(range(20000, 20000 + NUM_PORTS)))
    config = tmp_path / "haproxy.cfg"
    binds = "listen a\n  mode http\n  bind *:20001\nlisten b\n  mode http\n  bind :20002\n"
    config.write_text("defaults\n  timeout client 1s\n  timeout connect 1s\n  timeout server 1s\n" + binds)
    script = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    subprocess.run([script, "-c", "-db", "-f", str(config)], check=True, capture_output=True)
    assert [line.strip() for line in config.read_text().splitlines() if "bind" in line] == [
        "bind 127.0.0.1:20001",
        "bind 127.0.0.1:20002",
    ]


def test_haproxy_refuses_as_openai_does_where_no_replica_answers(tmp_path):
    """The real program, with Ray's plain answer in its configuration and nothing behind it."""
    import subprocess

    port, nobody, *others = choose_ports(2 + NUM_PORTS)
    environment = prepare_haproxy(tmp_path, others)
    (tmp_path / "500.http").write_bytes(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    errors = "".join(f"  errorfile {status} {tmp_path}/500.http\n" for status in (502, 503, 504))
    timeouts = "".join(f"  timeout {what} 2s\n" for what in ("client", "connect", "server"))
    listen = f"listen a\n  bind *:{port}\n  server gone 127.0.0.1:{nobody}\n"
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"defaults\n  mode http\n{timeouts}{errors}{listen}")
    haproxy = subprocess.Popen([environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)])
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:  # it is still starting
            answer = client.post(f"http://127.0.0.1:{port}/v1/completions", json={}, timeout=10)
    finally:
        haproxy.terminate()
        haproxy.wait()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    error = answer.json()["error"]
    expected = refuse(503, error["message"], "unavailable")
    assert answer.json() == json.loads(expected.body())


def test_haproxy_keeps_its_files_in_the_cluster_s_folder(tmp_path):
    environment = prepare_haproxy(tmp_path, list(range(20000, 20000 + NUM_PORTS)))
    paths = [value for value in environment.values() if value.startswith("/")]
    assert len(paths) == 6
    assert all(path.startswith(str(tmp_path)) for path in paths)


def test_an_engine_is_metered_unless_the_whole_cluster_is_not(monkeypatch):
    metered = build_config()
    assert metered.log_engine_metrics and metered.engine_kwargs["scheduler_cls"].endswith("MeteredScheduler")
    monkeypatch.setenv("SWIFTKV_METERING", "off")
    bare = build_config()
    assert not bare.log_engine_metrics and bare.engine_kwargs["disable_log_stats"]
    assert "scheduler_cls" not in bare.engine_kwargs
