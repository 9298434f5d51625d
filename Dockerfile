# modelfs as a privileged sidecar or DaemonSet; see deploy/.
FROM debian:trixie-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml uv.lock README.md LICENSE ./
COPY modelfs modelfs
RUN python3 -m venv /tools && /tools/bin/pip install --no-cache-dir uv \
    && UV_PROJECT_ENVIRONMENT=/opt/modelfs UV_PYTHON=/usr/bin/python3 UV_PYTHON_DOWNLOADS=never \
       /tools/bin/uv sync --locked --no-dev --all-extras --no-editable --compile-bytecode

FROM debian:trixie-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 fuse3 ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/modelfs /opt/modelfs
RUN ln -s /opt/modelfs/bin/modelfs /usr/local/bin/modelfs && ln -s /opt/modelfs/bin/mount.modelfs /sbin/mount.modelfs
ENTRYPOINT ["/usr/local/bin/modelfs"]
CMD ["doctor"]
