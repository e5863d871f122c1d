#!/bin/bash
# Sets the committed tree up on a bare system and starts one engine there: a minimal debootstrap of this machine's
# own release, with just the packages that the README names, as a user who is not root.
# Root only. Everything is mounted in a mount and process namespace of its own, so that nothing stays mounted or
# running when it ends, however it ends. SWIFTKV_CHROOT_PARENT (default /var/tmp) needs 6 GB.
# Called by: .ci/run. Calls: debootstrap, scripts/{debian_mirror.sh,pip_settings.py,smoke_engine.py}, make setup.
set -euo pipefail

packages=git,make,python3,python3-venv,libnuma1
tree="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$tree/scripts/debian_mirror.sh"

# --- outside: make the folder, enter the namespaces, remove the folder ---

if [ -z "${SWIFTKV_CHROOT:-}" ]; then
    [ "$(id -u)" -eq 0 ] || { echo "chroot: only root can do this" >&2; exit 1; }
    SWIFTKV_CHROOT="$(mktemp -d -p "${SWIFTKV_CHROOT_PARENT:-/var/tmp}" swiftkv-chroot.XXXXXX)"
    export SWIFTKV_CHROOT
    # The mounts died with the namespace; --one-file-system keeps a mount that did not from being emptied.
    trap 'rm -rf --one-file-system "$SWIFTKV_CHROOT"' EXIT
    chmod 755 "$SWIFTKV_CHROOT"
    unshare --mount --propagation private --pid --fork --kill-child "$0" "$@"
    exit
fi

# --- inside ---

root="$SWIFTKV_CHROOT"
say() { echo "chroot: $* (at ${SECONDS} s)"; }

unmount_all() {
    local mount
    # Deepest first: /dev/shm before /dev.
    while read -r mount; do umount "$mount" || umount --lazy "$mount"; done \
        < <(awk -v root="$root/" 'index($2, root) == 1 {print $2}' /proc/mounts | sort -r)
}
trap unmount_all EXIT

make_system() {
    # Nothing here outlives a power cut, so dpkg need not wait for the disk after each file.
    mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
    echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/ci"
    debootstrap --variant=minbase --include="$packages" --components="$components" \
        "$codename" "$root" "$mirror" >"$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; exit 1; }
    rm -f "$root.log"
    mount -t proc proc "$root/proc"
    mount --rbind --make-rslave /sys "$root/sys"
    # NIXL, Ray and torch pass tensors through /dev/shm.
    mkdir -p "$root/dev/shm"
    mount -t tmpfs -o size=2g,mode=1777 tmpfs "$root/dev/shm"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    cp /etc/hosts "$root/etc/hosts"
    chroot "$root" useradd --create-home newcomer
}

# The newcomer's pip looks where this machine's pip looks. An ordinary machine has nothing to pass on.
pass_pip_settings() {
    local kind path
    "$tree/.venv/bin/python" "$tree/scripts/pip_settings.py" "$root/etc/pip.conf" >"$root/tmp/pip-paths"
    while read -r kind path; do
        mkdir -p "$root$(dirname "$path")"
        if [ "$kind" = folder ]; then
            mkdir -p "$root$path"
            mount --bind -o ro "$path" "$root$path"
        else
            cp -L "$path" "$root$path"
        fi
    done <"$root/tmp/pip-paths"
}

as_newcomer() {
    chroot --userspec=newcomer:newcomer "$root" /usr/bin/env -i HOME=/home/newcomer USER=newcomer \
        PATH=/usr/local/bin:/usr/bin:/bin LC_ALL=C.UTF-8 ${http_proxy:+http_proxy="$http_proxy"} \
        ${https_proxy:+https_proxy="$https_proxy"} sh -ec "cd ~/swiftkv && $1"
}

find_mirror
say "making a bare $codename"
make_system
pass_pip_settings
mkdir "$root/home/newcomer/swiftkv"
git -c safe.directory="$tree" -C "$tree" archive HEAD | tar -x -C "$root/home/newcomer/swiftkv"
chroot "$root" chown -R newcomer:newcomer /home/newcomer/swiftkv
say "make setup"
as_newcomer "make setup"
say "one engine"
as_newcomer ".venv/bin/python scripts/smoke_engine.py" >"$root/tmp/smoke.log" 2>&1 ||
    { tail -n 60 "$root/tmp/smoke.log" >&2; exit 1; }
grep '^smoke:' "$root/tmp/smoke.log"
say "ok"
