# NATS 2.9 of Debian; like the official image, it takes the server's arguments as its command.
ARG BASE
FROM ${BASE}
ENTRYPOINT ["nats-server"]
