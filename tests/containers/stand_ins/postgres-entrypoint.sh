#!/bin/sh
# Makes the cluster at the first start, with the password of POSTGRES_PASSWORD_FILE, then serves it on every address.
set -eu
data=/var/lib/postgresql/18/docker
if [ "$(id -u)" = 0 ]; then
  chown postgres:postgres /var/lib/postgresql
  exec setpriv --reuid=postgres --regid=postgres --clear-groups "$0" "$@"
fi
if [ ! -s "$data/PG_VERSION" ]; then
  mkdir -p "$data" && chmod 700 "$data"
  initdb -D "$data" --username=postgres --encoding=UTF8 --locale=C.UTF-8 --auth=scram-sha-256 --pwfile="$POSTGRES_PASSWORD_FILE"
  echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
fi
exec postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
