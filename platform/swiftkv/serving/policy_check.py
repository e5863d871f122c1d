"""Refuses a pair whose sizes nobody would choose, or whose policy cannot work, before a cluster is touched.

Called by: serving/checks.py. Calls: serving/pair_policy.py.
"""

from typing import Any

from swiftkv.config import parse_settings
from swiftkv.errors import ConfigError
from swiftkv.serving.config import PairSettings
from swiftkv.serving.pair_policy import build_policy_settings

POLICY = "swiftkv.serving.autoscaling:PoolPolicy"
"""Ours, as a Serve config names it."""

_EXAMPLE = f"""\
    args: &pair
      …
    autoscaling_policy:
      policy_function: {POLICY}
      policy_kwargs: {{pair: *pair, settings: {{targets: {{ttft_s: 2, tpot_s: 0.1}}}}}}"""


def check_policy(policy: Any, pair: PairSettings, place: str) -> None:
    """Looks at an application's `autoscaling_policy` (None: it has none) and at its model.

    Raises: ConfigError if one is missing or has nothing to choose, is told of other pools than the application's, or of
    targets that no number of replicas meets, with the nearest that works; what `read_shape` raises.
    """
    ranges = {"prefill": pair.prefill, "decode": pair.decode}
    open_ones = [name for name, pool in ranges.items() if pool.min_replicas != pool.max_replicas]
    if policy is None and open_ones:
        pool = ranges[open_ones[0]]
        raise ConfigError(
            f"{place}: {open_ones[0]} has {pool.min_replicas} to {pool.max_replicas} replicas, and no policy chooses. "
            f"Make min_replicas and max_replicas equal, or add one:\n{_EXAMPLE}"
        )
    if not isinstance(policy, dict):
        return
    named = policy.get("policy_function")
    if named != POLICY:
        if str(named).startswith("swiftkv.serving."):
            raise ConfigError(
                f"{place}: autoscaling_policy.policy_function is {named}, which is not there. Nearest: {POLICY}."
            )
        return
    if not open_ones:
        raise ConfigError(
            f"{place}: min_replicas and max_replicas of both pools are equal, so the autoscaling_policy has nothing to "
            "choose. Raise max_replicas of one, or remove the policy."
        )
    given = policy.get("policy_kwargs") or {}
    _check_pair(given.get("pair"), pair, f"{place}: autoscaling_policy.policy_kwargs.pair")
    build_policy_settings(pair, given.get("settings") or {}, f"{place}: autoscaling_policy.policy_kwargs.settings")


def _check_pair(given: Any, pair: PairSettings, place: str) -> None:
    """Without one, settings hold limits and costs themselves, and must agree with the pools all the same."""
    told = pair if given is None else parse_settings(given, PairSettings, place)
    if different := [name for name in PairSettings.model_fields if getattr(told, name) != getattr(pair, name)]:
        raise ConfigError(
            f"{place} says otherwise than args in {', '.join(different)}. Write `args: &pair` and `pair: *pair`, so "
            "that both are one."
        )
