"""Refuses what asks nobody for a key at an address that others reach, before it runs there.

`swiftkv serve` and `swiftkv deploy` look at the config file (checks.py); `serve deploy` and KubeRay do not, so builders
of applications look at where Serve listens. Called by: checks.py, app.py, gateway/app.py. Calls: Serve's controller.
"""

from swiftkv.cluster import is_loopback
from swiftkv.errors import ConfigError


def check_address(host: str, place: str, remedy: str) -> None:
    """`place`: what would answer at `host`; `remedy`: what would make it ask. Raises: ConfigError if others reach."""
    if not is_loopback(host):
        raise ConfigError(
            f"{place} would answer whoever reaches {host} (http_options.host) without asking for a key. {remedy}, or "
            "give the host 127.0.0.1."
        )


def check_listening(place: str, remedy: str) -> None:
    """As `check_address`, of the address where the running Serve listens; nothing is said where no Serve runs."""
    from ray.serve.context import _get_global_client  # Ray 2.60 has no public way to ask

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        check_address(client.http_config.host or "127.0.0.1", place, remedy)


ADD_TENANTS = "Give it a tenants_file (`swiftkv key` makes keys)"
ADD_GATEWAY = "Put a gateway with a tenants_file before it, as deployments/serve/pools-laptop.yaml does"
