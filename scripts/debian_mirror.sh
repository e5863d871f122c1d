# shellcheck shell=bash
# Sourced by bash scripts that call debootstrap: ci_chroot.sh and docker/build_without_docker.sh. Changes nothing.

# Sets codename, mirror and components to this machine's release, from apt's own list of what it fetches, and exports
# apt's proxies.
find_mirror() {
    local targets
    codename="$(. /etc/os-release && echo "$VERSION_CODENAME")"
    targets="$(apt-get indextargets --format '$(CODENAME) $(REPO_URI) $(COMPONENT)' 'Created-By: Packages')"
    mirror="$(awk -v codename="$codename" '$1 == codename {print $2; exit}' <<<"$targets")"
    components="$(awk -v codename="$codename" -v mirror="$mirror" '$1 == codename && $2 == mirror {print $3}' \
        <<<"$targets" | sort -u | paste -sd,)"
    case "$mirror" in
        # A list of mirrors in a file, as on some hosted machines: the first will do.
        mirror+file:*) mirror="$(awk '/^http/ {print $1; exit}' "${mirror#mirror+file:}")" ;;
    esac
    [ -n "$mirror" ] || { echo "$0: apt names no mirror for $codename" >&2; exit 1; }
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    if [ -n "${http_proxy:-}" ]; then export http_proxy; fi
    if [ -n "${https_proxy:-}" ]; then export https_proxy; fi
}
