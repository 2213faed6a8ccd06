# What the build stage of deploy/Dockerfile needs beside Python: `strip`.
ARG BASE
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends binutils
