# A small image with etcdinit as its init: Alpine, the executable, the directories that it reads.
#
#   docker build -t etcdinit .                                     everything from source, some minutes
#   docker build -t etcdinit --target scratch .                    the executable and nothing else
# With the executable that was made here instead: python3 build.py && python3 build.py tree build/context/image, and then
#   docker build -t etcdinit --build-context build=build/context .

ARG DEBIAN=debian:trixie-slim
ARG ALPINE=alpine:3.23

FROM --platform=$BUILDPLATFORM ${DEBIAN} AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3
WORKDIR /src
COPY build.py etcdinit.py pyproject.toml ./
ARG VERSION
ARG REVISION
ARG TARGETARCH
RUN grep -q "^__version__ = \"${VERSION:-.*}\"$" etcdinit.py && \
    case "$TARGETARCH" in arm64) target=aarch64 ;; *) target=x86_64 ;; esac && \
    ETCDINIT_COMMIT=$REVISION python3 build.py tree /image --target $target

FROM scratch AS scratch
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="etcdinit" \
      org.opencontainers.image.description="Configuration from etcd and services under supervision, in one small program" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=build /image/ /
ENTRYPOINT ["/sbin/etcdinit"]
CMD ["--help"]

FROM ${ALPINE} AS alpine
ARG ALPINE
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="etcdinit" \
      org.opencontainers.image.description="Configuration from etcd and services under supervision, in one small program" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="$ALPINE"
COPY --from=build /image/ /
ENTRYPOINT ["/sbin/etcdinit", "init"]
