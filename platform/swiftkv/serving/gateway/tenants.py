"""Who may call: the tenants' file, and finding the tenant of a request by its key.

Counts nothing and refuses nothing for its amount (quotas.py does). Keys are known by their hashes only.
Called by: gateway/routes.py. Calls: gateway/keys.py, config.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from swiftkv.config import StrictModel, load_yaml
from swiftkv.errors import ConfigError
from swiftkv.serving.gateway.keys import hash_key
from swiftkv.serving.gateway.refusals import Refusal

Priority = Literal["interactive", "standard", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "standard", "batch")
"""In the order in which they are served: no one waits for a later class."""

CHECK_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


class Tenant(StrictModel):
    """Who pays for requests, and what it may do."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """In logs and as the label of metrics."""

    key_sha256: list[str] = Field(default=[], repr=False)  # a key may stand there by mistake: it is never shown
    """SHA-256 of each of its keys, hexadecimal (`swiftkv key` makes one). Several, so that a key can be replaced
    without a gap."""

    models: list[str] | None = None
    """Models it may use. None: all."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Over all gateways. None: no limit."""

    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and output tokens over all gateways. None: no limit."""

    priority: Priority = "standard"
    """Class of all its requests. An earlier class (interactive, standard, batch) is served before a later one."""

    weight: float = Field(default=1, gt=0, allow_inf_nan=False)
    """Share of tokens within its class while others of the class wait too."""

    @field_validator("key_sha256")
    @classmethod
    def _check_hashes(cls, given: list[str]) -> list[str]:
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in given):
            raise ValueError(
                "one is no SHA-256 of 64 hexadecimal digits. `swiftkv key` makes a key and shows its hash: the hash "
                "belongs here, the key itself nowhere but to its tenant"
            )
        return given

    def may_use(self, model: str) -> bool:
        """Whether the model is one of its own."""
        return self.models is None or model in self.models


class TenantsFile(StrictModel):
    """What the tenants' file holds."""

    tenants: list[Tenant]
    """In any order; names and keys are unique."""


ANONYMOUS = Tenant(name="anonymous")
"""Everyone, where there is no tenants' file."""


class TenantDirectory:
    """The tenants by key. A changed file is read at the next request after a second; a broken one changes nothing."""

    def __init__(self, path: str | None) -> None:
        """Raises: ConfigError if there is a path and the file is missing or wrong."""
        self._path = Path(path) if path else None
        self._by_hash: dict[str, Tenant] = {}
        self._seen: tuple[int, ...] | None = None
        self._next_check_s = 0.0
        if self._path:
            self._seen = _look_at(self._path)
            self._by_hash = load_tenants(self._path)

    def find(self, authorization: str | None) -> Tenant:
        """The tenant whose key the header `Authorization: Bearer KEY` holds.

        Raises: Refusal 401.
        """
        if self._path is None:
            return ANONYMOUS
        self._refresh(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refuse("no API key was given; send the header `Authorization: Bearer KEY`.")
        tenant = self._by_hash.get(hash_key(key.strip()))
        if tenant is None:
            raise _refuse("the API key is not known here.")
        return tenant

    def _refresh(self, path: Path) -> None:
        now = time.monotonic()
        if now < self._next_check_s:
            return
        self._next_check_s = now + CHECK_INTERVAL_S
        seen = _look_at(path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._by_hash = load_tenants(path)
            logger.info("%s was read again: %d keys", path, len(self._by_hash))
        except ConfigError as error:
            logger.error("the tenants stay as they were: %s", error)


def load_tenants(path: Path) -> dict[str, Tenant]:
    """The file's tenants by the hash of each key.

    Raises: ConfigError if the file is missing or wrong, or a name or key occurs twice.
    """
    tenants = load_yaml(path, TenantsFile).tenants
    found: dict[str, Tenant] = {}
    for tenant in tenants:
        for digest in tenant.key_sha256:
            if digest in found:
                raise ConfigError(f"{path}: tenants {found[digest].name} and {tenant.name} have the same key {digest}.")
            found[digest] = tenant
    names = [tenant.name for tenant in tenants]
    if len(names) != len(set(names)):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: tenants named twice: {', '.join(twice)}. Rename one.")
    return found


def _look_at(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _refuse(message: str) -> Refusal:
    headers = {"WWW-Authenticate": "Bearer"}
    return Refusal(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)
