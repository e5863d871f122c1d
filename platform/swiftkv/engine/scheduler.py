"""vLLM's scheduler, with a ledger of whose the engine's seconds are; decides nothing else than vLLM's own.

The engine's process writes the ledger to a file every second; whoever started the engine reads it.
Called by: vLLM, as named in serving/pools.py. Calls: engine/ledger.py, spec.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from swiftkv.engine.ledger import NOBODY, Ledger, Phase, Share
from swiftkv.engine.scheduler_names import FILE_KEY, TENANT_KEY
from swiftkv.errors import SwiftKVError
from swiftkv.spec import SwiftKVSpec

_WRITE_S = 1.0


class _Metered:
    """What both of vLLM's schedulers get."""

    requests: dict[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config.model_config.hf_config.to_dict()  # type: ignore[attr-defined]
        self._spec = _read_spec(config)
        self._ledger = Ledger(time.monotonic())
        self._lock = threading.Lock()
        if path := os.environ.get(FILE_KEY):
            threading.Thread(target=self._write, args=(Path(path),), name="ledger", daemon=True).start()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, and what each request has of the step."""
        began_s = time.monotonic()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        shares = [
            share
            for request_id, num_tokens in output.num_scheduled_tokens.items()
            for share in build_shares(self._spec, self.requests[request_id], num_tokens)
        ]
        with self._lock:
            self._ledger.schedule(began_s, shares)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; the step is over."""
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        waiting = [find_tenant(request) for request in self.requests.values()]
        with self._lock:
            self._ledger.finish(time.monotonic(), waiting, self.has_requests())  # type: ignore[attr-defined]
        return outputs

    def _write(self, path: Path) -> None:
        part = path.with_suffix(".part")
        while True:
            time.sleep(_WRITE_S)
            with self._lock:
                accounts = self._ledger.read(time.monotonic())
            rows = [[tenant, phase, seconds] for (tenant, phase), seconds in accounts.items()]
            try:
                part.write_text(json.dumps(rows), encoding="utf-8")
                part.replace(path)
            except OSError:
                return  # whoever reads it is gone, and its folder with it


class MeteredScheduler(_Metered, Scheduler):
    """For engines that schedule a step when the one before is over."""


class MeteredAsyncScheduler(_Metered, AsyncScheduler):
    """For engines that schedule the next step while one runs."""


def build_shares(spec: SwiftKVSpec | None, request: Request, num_tokens: int) -> Iterator[Share]:
    """What a request has of a step in which it has so many tokens, after vLLM has counted them as computed.

    A token that is not sampled from skips the later layers; the last one known runs them all.
    """
    end = request.num_computed_tokens
    start = end - num_tokens
    phase: Phase = "prefill" if start < request.num_prompt_tokens else "decode"
    num_sampled = 1 if end >= request.num_tokens else 0
    if spec is None:
        flops = float(num_tokens)
    else:
        # Of a prompt twice as long as the chunk's middle the average token attends to as much.
        skipping = spec.compute_prompt_token_flops(start + end).total * (num_tokens - num_sampled)
        flops = skipping + num_sampled * (spec.compute_decoded_token_flops(end).total + spec.compute_lm_head_flops())
    yield Share(find_tenant(request), phase, flops)


def find_tenant(request: Request) -> str:
    """Whose request it is, as the gateway says."""
    given = (request.sampling_params.extra_args or {}) if request.sampling_params else {}
    return str(given.get(TENANT_KEY, NOBODY))


def _read_spec(config: dict[str, Any]) -> SwiftKVSpec | None:
    try:
        return SwiftKVSpec.from_hf_config(config)
    except (SwiftKVError, KeyError):
        return None  # a family that the spec does not know: by tokens
