#!/bin/sh
# Installs a stage's Debian packages and leaves no list, cache or log of it: install_system.sh run | build
# Environment: DEVICE (cpu or cuda), COMPILER (yes or no).
set -eu

case "$1:$DEVICE" in
    # ca-certificates: buckets and the hub over HTTPS. libnuma1: vLLM's CPU build loads it.
    run:cpu) packages="ca-certificates libnuma1 python3" ;;
    # g++ and the headers: Triton compiles the launchers of its kernels when it first needs each, and an engine that finds
    # no compiler runs eager.
    run:cuda) packages="ca-certificates g++ libnuma1 python3 python3-dev" ;;
    build:cpu | build:cuda) packages="python3-venv" ;;
    *) echo "DEVICE is '$DEVICE', and can be cpu or cuda." >&2; exit 1 ;;
esac
case "$1:$COMPILER" in
    run:yes) packages="$packages g++ python3-dev" ;;
    run:no | build:*) ;;
    *) echo "COMPILER is '$COMPILER', and can be yes or no." >&2; exit 1 ;;
esac

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086  # a list
apt-get install -y -qq --no-install-recommends $packages >/tmp/apt.log 2>&1 || { cat /tmp/apt.log >&2; exit 1; }
rm /tmp/apt.log
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache \
    /var/lib/dpkg/*-old /var/log/* /root/.cache
# Debian compiles its own modules when it installs them, with their times inside.
find /usr/lib/python3* -name __pycache__ -prune -exec rm -rf {} +
