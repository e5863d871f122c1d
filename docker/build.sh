#!/bin/bash
# Builds the images swiftkv-train and swiftkv-serve, and writes what each holds into dist/: docker/build.sh [cpu | cuda]
# Environment:
#   BASE_IMAGE   Debian 12 by digest; by default SWIFTKV_BASE_IMAGE of docker/.env
#   IMAGES       of train and serve, those to build; by default both
#   COMPILER     yes leaves a g++ in images for CPUs, so that their engines compile; by default no
#   PIP_CONF     a pip.conf for the build, which stays in no layer
#   BUILDER      docker, or buildah with BUILD_OPTIONS (docker/build_without_docker.sh)
# Called by: make images, docker/build_without_docker.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device="${1:-cpu}"
builder="${BUILDER:-docker}"

refuse() { echo "images: $*" >&2; exit 1; }

find_base() {
    base="${BASE_IMAGE:-$(sed -n 's/^SWIFTKV_BASE_IMAGE=//p' docker/.env 2>/dev/null || true)}"
    case "$base" in
        *@sha256:* | localhost/*) ;;
        "") refuse "no base image: name Debian 12 by digest in SWIFTKV_BASE_IMAGE of docker/.env (make env), or in" \
            "BASE_IMAGE." ;;
        *) refuse "the base image is $base, which names no digest (name@sha256:…), so no two builds need be alike." ;;
    esac
}

find_arguments() {
    [ -f "requirements/$device.txt" ] || refuse "there is no requirements/$device.txt: DEVICE is cpu or cuda."
    local git=(git -c safe.directory="$PWD") revision
    version="$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' platform/swiftkv/__init__.py)"
    revision="$("${git[@]}" describe --always --dirty --exclude='*' --abbrev=40)"
    SOURCE_DATE_EPOCH="$("${git[@]}" log -1 --format=%ct)"
    export SOURCE_DATE_EPOCH
    arguments=(
        --build-arg "BASE_IMAGE=$base"
        --build-arg "DEVICE=$device"
        --build-arg "COMPILER=${COMPILER:-no}"
        --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH"
        --build-arg "VERSION=$version"
        --build-arg "REVISION=$revision"
        --build-arg "CREATED=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)"
    )
    if [ -n "${PIP_CONF:-}" ]; then arguments+=(--secret "id=pip_conf,src=$PIP_CONF"); fi
}

build_image() {
    local image="$1" tag="swiftkv-$1:$version-$device"
    local common=(--file "docker/$image.Dockerfile" --target "$image" "${arguments[@]}")
    case "$builder" in
        docker) docker buildx build "${common[@]}" --output "type=docker,name=$tag,rewrite-timestamp=true" . ;;
        buildah)
            # shellcheck disable=SC2086  # a list
            buildah build "${common[@]}" ${BUILD_OPTIONS:-} --format docker --timestamp "$SOURCE_DATE_EPOCH" --tag "$tag" .
            ;;
        *) refuse "BUILDER is $builder, and can be docker or buildah." ;;
    esac
}

# Through a container that never runs, whose files the builder hands out.
write_sbom() {
    local tag="swiftkv-$1:$version-$device" target="dist/swiftkv-$1-$version-$device.cdx.json" container
    mkdir -p dist
    if [ "$builder" = docker ]; then
        container="$(docker create "$tag")"
        docker cp --quiet "$container:/usr/share/swiftkv/sbom.cdx.json" "$target"
        docker rm "$container" >/dev/null
    else
        container="$(buildah from "$tag")"
        cp "$(buildah mount "$container")/usr/share/swiftkv/sbom.cdx.json" "$target"
        buildah rm "$container" >/dev/null
    fi
    echo "images: $tag (at ${SECONDS} s), what it holds: $target"
}

find_base
find_arguments
for image in ${IMAGES:-train serve}; do
    build_image "$image"
    write_sbom "$image"
done
