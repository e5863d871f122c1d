"""vLLM's scheduler, with a ledger of whose the engine's seconds are; decides nothing else than vLLM's own.

The engine's process writes the ledger to a file every second; whoever started the engine reads it.
Called by: vLLM, as named in serving/pools.py. Calls: engine/ledger.py, engine/step_work.py.
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

from swiftkv.engine.ledger import NOBODY, Accounts, Ledger, Phase, Share
from swiftkv.engine.scheduler_names import FILE_KEY, TENANT_KEY
from swiftkv.engine.settings import ROLE_KEY, SKIPPING_KEY
from swiftkv.engine.step_work import StepWork
from swiftkv.errors import SwiftKVError
from swiftkv.spec import SwiftKVSpec

_WRITE_S = 1.0


class _Metered:
    """What both of vLLM's schedulers get."""

    requests: dict[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config  # type: ignore[attr-defined]
        self._work = _read_work(config.model_config.hf_config.to_dict(), config.additional_config)
        self._num_devices = config.parallel_config.world_size
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
            for share in build_shares(self._work, self.requests[request_id], num_tokens)
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
            try:
                part.write_text(json.dumps(self._list_rows(accounts)), encoding="utf-8")
                part.replace(path)
            except OSError:
                return  # whoever reads it is gone, and its folder with it

    def _list_rows(self, accounts: Accounts) -> dict[str, list[list[Any]]]:
        """As serving/costs.py counts them. A model whose FLOPs nobody knows has seconds alone."""
        rows: dict[str, list[list[Any]]] = {"seconds": [[*key, value] for key, value in accounts.seconds.items()]}
        if self._work is not None:
            rows["unmodified_seconds"] = [[tenant, value] for tenant, value in accounts.unmodified_seconds.items()]
            rows["device_flops"] = [[*key, value / self._num_devices] for key, value in accounts.flops.items()]
        return rows


class MeteredScheduler(_Metered, Scheduler):
    """For engines that schedule a step when the one before is over."""


class MeteredAsyncScheduler(_Metered, AsyncScheduler):
    """For engines that schedule the next step while one runs."""


def build_shares(work: StepWork | None, request: Request, num_tokens: int) -> Iterator[Share]:
    """What a request has of a step in which it has so many tokens, after vLLM has counted them as computed.

    The last token known is sampled from. A model whose FLOPs nobody knows is split by tokens.
    """
    end = request.num_computed_tokens
    start = end - num_tokens
    phase: Phase = "prefill" if start < request.num_prompt_tokens else "decode"
    if work is None:
        yield Share(find_tenant(request), phase, float(num_tokens), float(num_tokens))
        return
    flops = work.count(start, end, num_sampled=1 if end >= request.num_tokens else 0)
    yield Share(find_tenant(request), phase, flops["executed"], flops["unmodified"])


def find_tenant(request: Request) -> str:
    """Whose request it is, as the gateway says."""
    given = (request.sampling_params.extra_args or {}) if request.sampling_params else {}
    return str(given.get(TENANT_KEY, NOBODY))


def _read_work(config: dict[str, Any], additional: Any) -> StepWork | None:
    own = additional if isinstance(additional, dict) else {}
    try:
        spec = SwiftKVSpec.from_hf_config(config)
    except (SwiftKVError, KeyError):
        return None  # a family that the spec does not know
    return StepWork(spec, own.get(SKIPPING_KEY, True), own.get(ROLE_KEY) == "prefill")
