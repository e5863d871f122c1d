"""Registration changes nothing that vLLM had, and refuses settings that cannot work."""

import subprocess
import sys

import pytest
import torch

from swiftkv.families import FAMILIES

SNAPSHOT = """
import sys, types
import vllm.model_executor.models.config, vllm.v1.worker.gpu_model_runner
import vllm.model_executor.models.llama, vllm.model_executor.layers.attention, transformers
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

def look():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "vllm" or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__.startswith("vllm"):
                found |= {(name, key, member): id(v) for member, v in vars(value).items() if callable(v)}
    return found

before, config_map, models = look(), dict(MODELS_CONFIG_MAP), dict(ModelRegistry.models)
from swiftkv.engine.plugin import register
register()
register()
import swiftkv.engine.model  # vLLM imports by name what was registered: that must be innocent too
after = look()
changed = [key for key, value in before.items() if after.get(key) != value and key[1] != "__warningregistry__"]
assert len(before) > 10_000, len(before)
assert not changed, changed[:20]
assert {k: v for k, v in MODELS_CONFIG_MAP.items() if k in config_map} == config_map
assert {k: v for k, v in ModelRegistry.models.items() if k in models} == models
print(sorted(set(MODELS_CONFIG_MAP) - set(config_map)), sorted(set(ModelRegistry.models) - set(models)))
"""


def test_registration_adds_our_names_and_changes_nothing_that_existed() -> None:
    result = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    ours = sorted(family.architecture for family in FAMILIES.values())
    assert result.stdout.splitlines()[-1] == f"{ours} {ours}"


ASKED = """
import ctypes
from swiftkv.engine.plugin import register
register()
allowed = ctypes.c_ulonglong()
ARCH_PRCTL, ARCH_GET_XCOMP_PERM = 158, 0x1022
assert ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(allowed)) == 0
print(allowed.value >> 18 & 1)
"""


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("amx_tile"), reason="this CPU has no AMX")
def test_a_process_of_the_engine_may_use_amx_from_its_first_token() -> None:
    result = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "1"


def test_vllm_finds_the_plugin_of_the_installed_package() -> None:
    from importlib.metadata import entry_points

    points = [point for point in entry_points(group="vllm.general_plugins") if point.name == "swiftkv"]
    assert [point.value for point in points] == ["swiftkv.engine.plugin:register"]


@pytest.mark.parametrize("skipping", [True, False])
def test_settings_become_vllms_arguments(skipping: bool) -> None:
    from swiftkv.engine.settings import SKIPPING_KEY, EngineSettings

    settings = EngineSettings(skipping=skipping, kv_cache_gib=0.5, cpu_cores="0-1", enforce_eager=True)
    arguments = settings.build_engine_arguments()
    assert arguments["kv_cache_memory_bytes"] == 2**29 and arguments["enforce_eager"] is True
    assert arguments.get("additional_config") == (None if skipping else {SKIPPING_KEY: False})
    assert arguments["load_format"] == "safetensors" and arguments["trust_remote_code"] is False
    assert settings.build_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


@pytest.mark.parametrize("works", [True, False])
def test_the_engine_compiles_only_where_a_compiler_works(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftkv.engine import one_process
    from swiftkv.engine.settings import EngineSettings

    monkeypatch.setattr("swiftkv.engine.compiler.has_cxx_compiler", lambda: works)
    assert EngineSettings().is_eager() is not works
    assert EngineSettings().lacks_compiler() is not works
    assert EngineSettings(enforce_eager=True).is_eager() and not EngineSettings(enforce_eager=True).lacks_compiler()
    # An eager vLLM still compiles parts of its sampler, which scripts/smoke_engine.py tries on a bare system.
    for environment in (EngineSettings(enforce_eager=True).build_environment(), one_process.build_environment(1, "0")):
        assert (environment.get("TORCH_COMPILE_DISABLE") == "1") is not works
