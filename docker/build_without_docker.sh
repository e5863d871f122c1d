#!/bin/bash
# Builds the images where no container engine runs, from the same Dockerfiles: Debian's buildah, which needs no daemon,
# in chroot isolation, on a Debian that debootstrap makes. docker/build_without_docker.sh [cpu | cuda]
# Root only, on Debian 12: apt-get install buildah debootstrap. Images stay in SWIFTKV_IMAGES (by default
# /var/tmp/swiftkv-images, 12 GB for each image while it is built) until that folder is removed.
# Called by: make images, where there is no docker. Calls: docker/build.sh, debootstrap, scripts/pip_settings.py.
set -euo pipefail
tree="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$tree/scripts/debian_mirror.sh"

device="${1:-cpu}"
folder="${SWIFTKV_IMAGES:-/var/tmp/swiftkv-images}"
base=localhost/swiftkv-base:bookworm

say() { echo "images: $* (at ${SECONDS} s)"; }

check_machine() {
    [ "$(id -u)" -eq 0 ] || { echo "images: only root can build without an engine" >&2; exit 1; }
    local missing=()
    for program in buildah debootstrap; do command -v "$program" >/dev/null || missing+=("$program"); done
    [ ${#missing[@]} -eq 0 ] || { echo "images: apt-get install ${missing[*]}" >&2; exit 1; }
}

# buildah reads these wherever it is called from.
configure_buildah() {
    mkdir -p "$folder"
    cat >"$folder/storage.conf" <<END
[storage]
driver = "${STORAGE_DRIVER:-vfs}"
graphroot = "$folder/graph"
runroot = "$folder/run"
END
    echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$folder/policy.json"
    unset STORAGE_DRIVER
    export CONTAINERS_STORAGE_CONF="$folder/storage.conf" BUILDAH_ISOLATION=chroot TMPDIR="$folder"
    # No layer of a stage is kept: with the driver vfs each would be a whole copy.
    BUILD_OPTIONS="--layers=false --signature-policy $folder/policy.json"
}

make_base() {
    ! buildah inspect --type image "$base" >/dev/null 2>&1 || return 0
    local root="$folder/base" container
    rm -rf --one-file-system "$root"
    mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
    echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/images"
    # What debian:…-slim leaves out too.
    printf 'path-exclude %s\n' '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/info/*' \
        >>"$root/etc/dpkg/dpkg.cfg.d/images"
    debootstrap --variant=minbase --components="$components" "$codename" "$root" "$mirror" >"$root.log" 2>&1 ||
        { tail -n 20 "$root.log" >&2; exit 1; }
    rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* "$root.log"
    # As an archive, which keeps owners; of a folder everything would become root's.
    tar --create --file "$root.tar" --directory "$root" --numeric-owner --sort=name --mtime="@0" \
        --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' .
    container="$(buildah from scratch)"
    buildah add --quiet "$container" "$root.tar" / >/dev/null
    buildah config --cmd /bin/sh "$container"
    buildah commit --quiet --rm --signature-policy "$folder/policy.json" "$container" "$base" >/dev/null
    rm -rf --one-file-system "$root" "$root.tar"
}

# The build's pip looks where this machine's pip looks. An ordinary machine has nothing to pass on.
pass_pip_settings() {
    local python="$tree/.venv/bin/python" kind path place
    [ -x "$python" ] || python=python3
    PYTHONPATH= "$python" "$tree/scripts/pip_settings.py" "$folder/pip.conf" >"$folder/pip-paths"
    while read -r kind path; do
        place="$path"
        # A file of this machine may be one that a Debian package of the image writes, such as the certificates.
        if [ "$kind" = file ]; then
            place="/run/builder$path"
            sed -i "s#= $path\$#= $place#" "$folder/pip.conf"
        fi
        BUILD_OPTIONS+=" --volume $path:$place:ro"
    done <"$folder/pip-paths"
    export PIP_CONF="$folder/pip.conf"
}

check_machine
find_mirror
configure_buildah
make_base
say "the base, $base"
pass_pip_settings
BASE_IMAGE="$base" BUILDER=buildah BUILD_OPTIONS="$BUILD_OPTIONS" "$tree/docker/build.sh" "$device"
buildah images
say "ok; they are in $folder"
