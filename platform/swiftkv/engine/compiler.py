"""Says whether an engine can compile its kernels on this machine; where it cannot, the engine runs eager.

Installs nothing and imports neither torch nor vLLM. This is the one place where eager or compiled is chosen.
Called by: the engine's settings, scripts/setup.py and scripts/smoke_engine.py. Calls: the C++ compiler.
Source: torch 2.13 `_inductor/config.py` (`cpp.cxx`: $CXX, else g++) and `_inductor/codecache.py`, whose CPU
kernels are Python extensions that include Python.h and use OpenMP.
"""

import functools
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

EAGER_REASON = (
    "no working C++ compiler, so the engine runs eager (the same answers, slower). "
    "To compile: sudo apt install g++ python3-dev"
)

_NOTHING_COMPILED = {"TORCH_COMPILE_DISABLE": "1"}

_COMPILE_TIMEOUT_S = 60
_PROBE_SOURCE = (
    "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint probe() { return omp_get_max_threads(); }\n"
)


def has_cxx_compiler() -> bool:
    """True if $CXX, or g++ where it is not set, builds a Python extension with OpenMP.

    A compiler without Python's headers counts as none: inductor's kernels include Python.h. Takes about half
    a second the first time in a process and for each value of $CXX.
    """
    return _builds_extension(os.environ.get("CXX") or "g++")


def build_environment() -> dict[str, str]:
    """What an engine's process needs on this machine: without a compiler, that torch compiles nothing.

    An eager vLLM still compiles a part of its sampler, and one of its log probabilities, when a request first needs
    them, and the engine dies of it (vLLM 0.29, v1/sample/ops).
    """
    return {} if has_cxx_compiler() else dict(_NOTHING_COMPILED)


@functools.cache
def _builds_extension(cxx: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="swiftkv-cxx-") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_PROBE_SOURCE)
        include = f"-I{sysconfig.get_path('include')}"
        command = [cxx, "-shared", "-fPIC", "-fopenmp", include, str(source), "-o", f"{folder}/probe.so"]
        try:
            result = subprocess.run(command, capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
    return result.returncode == 0
