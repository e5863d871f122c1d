# What serves: Ray, Ray Serve and vLLM with SwiftKV installed from its wheel, on CPUs or on GPUs.
# Build it with `make images`, which gives the arguments:
#   BASE_IMAGE         Debian 12 by digest (debian:bookworm-slim@sha256:…); without it nothing is built
#   DEVICE             cpu or cuda: which of requirements/*.txt is installed
#   COMPILER           yes: on CPUs the engine compiles its kernels with the g++ that then stays inside; no: it runs eager
#   SOURCE_DATE_EPOCH  seconds that all times in the image are
#   VERSION, REVISION, CREATED   for its labels
ARG BASE_IMAGE

FROM ${BASE_IMAGE} AS system
ARG DEVICE=cpu
ARG COMPILER=no
ARG SOURCE_DATE_EPOCH
RUN --mount=type=bind,source=docker/image,target=/build sh /build/install_system.sh run

FROM system AS build
ARG DEVICE=cpu
ARG COMPILER=no
ARG SOURCE_DATE_EPOCH
RUN --mount=type=bind,source=docker/image,target=/build sh /build/install_system.sh build
WORKDIR /source
COPY pyproject.toml ./
COPY requirements ./requirements
COPY scripts ./scripts
COPY docker/image ./docker/image
# A pip.conf of the builder's own (a mirror, say) is a secret: it is there for these commands and in no layer.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf python3 docker/image/install.py packages serve
COPY README.md ./
COPY platform ./platform
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf python3 docker/image/install.py wheel

# What the image holds, alone: docker build --target sbom --output FOLDER …
FROM scratch AS sbom
COPY --from=build /opt/sbom.cdx.json /

FROM system AS serve
ARG DEVICE=cpu
ARG BASE_IMAGE
ARG SOURCE_DATE_EPOCH
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="swiftkv-serve" \
      org.opencontainers.image.description="SwiftKV models on Ray Serve and vLLM (${DEVICE})" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
RUN groupadd --gid 10001 swiftkv \
    && useradd --uid 10001 --gid 10001 --no-log-init --create-home --shell /bin/sh swiftkv \
    && install --directory --owner=10001 --group=10001 /var/lib/swiftkv \
    && rm -rf /var/log/* /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow-
COPY docker/image/entrypoint docker/image/healthcheck /usr/local/bin/
COPY --from=build /opt/swiftkv /opt/swiftkv
COPY --from=build /opt/sbom.cdx.json /usr/share/swiftkv/
ENV PATH=/opt/swiftkv/bin:/usr/local/bin:/usr/bin:/bin \
    LC_ALL=C.UTF-8 \
    SWIFTKV_HOME=/var/lib/swiftkv \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/lib/swiftkv
# Of a Ray node, head or worker; without a token, on loopback.
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=6 \
    CMD ["healthcheck", "http://127.0.0.1:52365/api/healthz"]
ENTRYPOINT ["entrypoint"]
CMD ["swiftkv", "node", "head"]
