"""Builds Serve applications: one model behind our ingress, or a version without one, for the gateway to call.

Called by: Ray Serve, through the import paths `swiftkv.serving.app:build_…` of a config file.
Calls: serving/source.py, serving/checks.py, serving/exposure.py, serving/pools.py, serving/ingress.py.
"""

from ray import serve
from ray.serve.llm import LLMConfig

from swiftkv.serving.checks import check_model
from swiftkv.serving.config import PairSettings, PoolSettings
from swiftkv.serving.exposure import ADD_GATEWAY, check_listening
from swiftkv.serving.ingress import build_ingress, build_model_card
from swiftkv.serving.pools import build_pair, build_pool
from swiftkv.serving.source import AnyModel, resolve_model

# What the ingress holds at once: it only passes bytes on, so its bound is there to be one.
INGRESS_MAX_ONGOING_REQUESTS = 1000


def build_app(settings: PoolSettings) -> serve.Application:
    """The application that answers OpenAI requests for one model from one pool.

    Raises: what `resolve_model` raises; ConfigError if its devices cannot hold the model, or others reach it: it asks
    for no key.
    """
    check_listening(settings.model, ADD_GATEWAY)
    return _add_ingress(*build_pool(_resolve(settings)))


def build_pair_app(settings: PairSettings) -> serve.Application:
    """The same from a prefill pool and a decode pool."""
    check_listening(settings.model, ADD_GATEWAY)
    return _add_ingress(*build_pair(_resolve(settings)))


def build_pool_version(settings: PoolSettings) -> serve.Application:
    """One pool without HTTP, which the gateway calls by the application's name."""
    return build_pool(_resolve(settings))[1]


def build_pair_version(settings: PairSettings) -> serve.Application:
    """A prefill pool and a decode pool without HTTP, which the gateway calls by the application's name."""
    return build_pair(_resolve(settings))[1]


def _resolve(settings: AnyModel) -> AnyModel:
    resolved = resolve_model(settings)
    check_model(resolved, "args")  # `swiftkv serve` has done so before, `serve deploy` has not
    return resolved


def _add_ingress(config: LLMConfig, model: serve.Application) -> serve.Application:
    ingress = serve.deployment(
        build_ingress(),
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=INGRESS_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(
        llm_deployments={config.model_id: model}, model_cards={config.model_id: build_model_card(config)}
    )
