"""What all requests of one gateway process share: settings, tenants, admission, versions.

Answers nothing itself.
Called by: gateway/routes.py, gateway/generation.py, gateway/app.py.
"""

import asyncio
import hashlib
import secrets
import time
from typing import Any

from swiftkv.serving.gateway.admission import Admission
from swiftkv.serving.gateway.admission_client import AdmissionClient, SharedAdmission
from swiftkv.serving.gateway.comparing import Comparer
from swiftkv.serving.gateway.exchange import NOBODY, Exchange
from swiftkv.serving.gateway.refusals import refuse
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.gateway.tenants import Tenant, TenantDirectory
from swiftkv.serving.gateway.upstream import Upstream
from swiftkv.serving.usage.writer import UsageWriter

READY_FOR_S = 1.0
"""How long one look at the versions holds: whoever asks more often gets the last answer."""


class Gateway:
    """One gateway process."""

    def __init__(self, settings: GatewaySettings, upstream: Upstream, shared: SharedAdmission) -> None:
        """Raises: ConfigError if the tenants' file is missing or wrong."""
        self.settings = settings
        self.tenants = TenantDirectory(settings.tenants_file)
        self.upstream = upstream
        self.name = secrets.token_hex(8)
        self._usage = UsageWriter(settings.usage_store, self.name) if settings.usage_store else None
        self._local = Admission(settings, share=1 / settings.num_replicas)
        self.admission = AdmissionClient(self.name, self._local, shared, settings.lease_s, self._count_unwritten_tokens)
        self.comparer = Comparer(upstream, self.admission.note)
        self._began = int(time.time())
        self._looking = asyncio.Lock()
        self._looked_s = -READY_FOR_S
        self._was_ready = False

    def configure(self, settings: GatewaySettings) -> None:
        """Takes other routes, capacities and limits for the requests to come.

        Raises: ConfigError if another tenants' file is missing or wrong; nothing has changed then.
        """
        if settings.tenants_file != self.settings.tenants_file:
            self.tenants = TenantDirectory(settings.tenants_file)
        self.settings = settings
        self._local.configure(settings)
        self.upstream.forget()

    def note_end(self, exchange: Exchange) -> None:
        """A request has ended; that of a known tenant leaves a record."""
        if self._usage is not None and exchange.tenant != NOBODY:
            self._usage.add(exchange.build_usage())

    async def close(self) -> None:
        """Writes what is still to be written, and tells admission so: nothing is lost with this process."""
        if self._usage is not None:
            await asyncio.to_thread(self._usage.close)
        await self.admission.close()

    def choose_model(self, given: Any, tenant: Tenant) -> str:
        """The model that a request means.

        Raises: Refusal 400, 403 or 404.
        """
        if given is None:
            usable = self._find_usable(tenant)
            if len(usable) != 1:
                raise refuse(400, f"model is missing; it can be {_join(usable)}.", param="model")
            return usable[0]
        if not isinstance(given, str):
            raise refuse(400, "model is not a string.", param="model")
        if given not in self.settings.models:
            usable = self._find_usable(tenant)
            message = f"there is no model {given[:100]!r} here; there is {_join(usable)}."
            raise refuse(404, message, "model_not_found", "model")
        if not tenant.may_use(given):
            raise refuse(403, f"tenant {tenant.name} may not use the model {given}.", "model_not_allowed", "model")
        return given

    def describe_model(self, model: str) -> dict[str, Any]:
        """The model as OpenAI's API lists it."""
        return {"id": model, "object": "model", "created": self._began, "owned_by": "swiftkv"}

    def list_models(self, tenant: Tenant) -> dict[str, Any]:
        """All that the tenant may use."""
        return {"object": "list", "data": [self.describe_model(model) for model in self._find_usable(tenant)]}

    def salt(self, tenant: Tenant, given: str | None) -> str | None:
        """What a request's cached prefixes are kept under: nobody can name another tenant's."""
        if self.settings.shared_prefix_cache:
            return given
        return hashlib.sha256(f"{tenant.name}\0{given or ''}".encode()).hexdigest()

    async def is_ready(self) -> bool:
        """Whether at least one model can be served now."""
        async with self._looking:
            if time.monotonic() - self._looked_s >= READY_FOR_S:
                looks = (self.upstream.answers(model) for model in self.settings.models.values())
                self._was_ready = any(await asyncio.gather(*looks))
                self._looked_s = time.monotonic()
        return self._was_ready

    def _count_unwritten_tokens(self) -> int:
        return 0 if self._usage is None else self._usage.unwritten_tokens

    def _find_usable(self, tenant: Tenant) -> list[str]:
        return [model for model in self.settings.models if tenant.may_use(model)]


def _join(names: list[str]) -> str:
    return ", ".join(names) or "none for this tenant"
