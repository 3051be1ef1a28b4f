# The images of vmtap: `agent` is vmtapd, vmtapctl and the shim that `vmtapctl install` puts into a node's CNI folder;
# `launcher` is vmtap-launch and QEMU. Neither contains a compiler, pip or its cache.
#
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/vmtap:VERSION --push .
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/vmtap-launcher:VERSION --target launcher --push .
#
# podman and buildah work too. Nothing is cross-compiled: each platform is built natively or under emulation.
#
# BASE: any Debian 12 or newer with Python 3.11 or newer and its venv module. The digest is that of the index of all
# platforms, published as 3.12.15-slim-bookworm; CONTRIBUTING.md says how to update it.
ARG BASE=docker.io/library/python:3.12-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev musl-tools
WORKDIR /src
# The packages to build with, and then the packages to run with, by version and hash.
COPY deploy/requirements.lock deploy/
COPY requirements.lock .
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
RUN python3 -m venv /opt/vmtap && /opt/vmtap/bin/pip install --no-cache-dir --require-hashes -r deploy/requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY cni cni
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheel . \
    && /opt/vmtap/bin/pip install --no-cache-dir --no-deps /wheel/*.whl
# The launcher has its own folder, with the only library that it imports (for the seed). The executables of both folders
# name /opt/vmtap, where each is in its image.
RUN cp -a /opt/vmtap /launcher \
    && /launcher/bin/python -m pip freeze --exclude vmtap-cni --exclude pycdlib \
        | xargs /launcher/bin/python -m pip uninstall -y \
    && rm /launcher/bin/vmtap /launcher/bin/macvtap /launcher/bin/vmtapd /launcher/bin/vmtapctl \
    && /launcher/bin/python -m pip uninstall -y setuptools pip \
    && /opt/vmtap/bin/python -m pip uninstall -y setuptools pip

FROM ${BASE} AS launcher
LABEL org.opencontainers.image.title="vmtap-launcher" org.opencontainers.image.licenses="Apache-2.0"
RUN case "$(dpkg --print-architecture)" in amd64) qemu=x86 ;; arm64) qemu=arm ;; *) qemu=misc ;; esac \
    && apt-get update \
    && apt-get install -y --no-install-recommends "qemu-system-$qemu" \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
COPY --from=build /launcher /opt/vmtap
ENV PATH=/opt/vmtap/bin:$PATH
# The user of KubeVirt's QEMU, which owns device nodes unless a network config names another.
USER 107:107
ENTRYPOINT ["vmtap-launch"]

# The last target is the default of a build without --target.
FROM ${BASE} AS agent
LABEL org.opencontainers.image.title="vmtap" org.opencontainers.image.licenses="Apache-2.0"
# It compiles the filters of `vmtapctl capture`.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpcap0.8 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
COPY --from=build /opt/vmtap /opt/vmtap
ENV PATH=/opt/vmtap/bin:$PATH
ENTRYPOINT ["vmtapd"]
