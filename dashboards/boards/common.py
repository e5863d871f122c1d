"""Matchers and queries that several boards have. Read by: the other files of boards/."""

from panels import Query

BY_MODEL = '{model=~"$model"}'
BY_TENANT = '{tenant=~"$tenant", model=~"$model"}'
OF_APPLICATION = 'application=~"$application"'
BY_POOL = '{application=~"$application", pool=~"$pool", replica=~"$replica"}'


def quantiles(name: str, of: str, *fractions: float) -> tuple[Query, ...]:
    """Of a histogram of the gateway, over five minutes."""
    return tuple(
        Query(
            f"histogram_quantile({fraction}, sum by (le, {of}) ("
            f"rate(ray_swiftkv_gateway_{name}_bucket{BY_TENANT}[5m])))",
            f"{name.partition('_')[0].upper()} p{100 * fraction:g} {{{{{of}}}}}",
        )
        for fraction in fractions
    )


def heat_map(name: str) -> tuple[Query, ...]:
    return (Query(f"sum by (le) (increase(ray_swiftkv_gateway_{name}_bucket{BY_TENANT}[$__rate_interval]))", "{{le}}"),)
