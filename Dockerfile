# The agent's image: vmtapd and vmtapctl, and the shim to be put into a node's CNI folder. No compiler, no pip cache.
#
#   docker build -t vmtap .            # podman and buildah build it as well
#
# BASE: any Debian 12 or newer with Python 3.11 or newer and its venv module.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev musl-tools \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# What is needed to build, and then what is needed to run; both by version and hash.
COPY deploy/requirements.lock deploy/
COPY requirements.lock .
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
RUN python3 -m venv /opt/vmtap && /opt/vmtap/bin/pip install --no-cache-dir --require-hashes -r deploy/requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY cni cni
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheel . \
    && /opt/vmtap/bin/pip install --no-cache-dir --no-deps /wheel/*.whl \
    && /opt/vmtap/bin/pip uninstall -y pip \
    && install -D cni/shim/vmtap /opt/vmtap/cni/vmtap

FROM ${BASE}
COPY --from=build /opt/vmtap /opt/vmtap
ENV PATH=/opt/vmtap/bin:$PATH
ENTRYPOINT ["vmtapd"]
