#!/bin/sh
# Checks docker/.env, starts the stack and waits until the endpoint answers. Run by `make up`.
set -eu
cd "$(dirname "$0")"

# A setting of .env, which check.py has found to be well.
setting() { sed -n "s/^$1=//p" .env | tr -d "\"'"; }

python3 check.py
if ! command -v docker >/dev/null; then
    echo "up: there is no docker here. Install Docker Engine with its compose plugin, then run this again." >&2
    exit 1
fi
image="$(setting SWIFTKV_IMAGE)"
if ! docker image inspect "$image" >/dev/null 2>&1; then
    echo "up: there is no image $image here. Build it: make images" >&2
    exit 1
fi

docker compose up --detach --remove-orphans
echo "up: waiting for the endpoint; \`make logs\` shows what it waits for"
waited=0
until [ "$(docker inspect --format '{{.State.Health.Status}}' "$(docker compose ps --quiet endpoint)")" = healthy ]; do
    if [ "$waited" -ge 1200 ]; then
        echo "up: the endpoint does not answer after 20 minutes. What it says:" >&2
        docker compose logs --tail 20 endpoint >&2
        exit 1
    fi
    sleep 5
    waited=$((waited + 5))
done
echo "up: endpoint http://127.0.0.1:$(setting SWIFTKV_PORT)/v1 (keys: $(setting SWIFTKV_TENANTS_FOLDER)/tenants.yaml)," \
    "Grafana http://127.0.0.1:$(setting GRAFANA_PORT)"
