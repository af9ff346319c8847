# The cloud side: frozen decoder layers, A and B, KV cache. Build from the repository's root:
#   docker build -f docker/cloud.Dockerfile -t privatelora-cloud .
# docs/operations.md says how to run it; in a container the cloud listens beyond loopback, so it asks for TLS and for
# tokens or a client CA. The set-up is the Makefile's own. PyTorch's wheels bring the mathematical libraries of CUDA
# with them; the base has its runtime and what the container toolkit looks for. Without a GPU:
#   --build-arg BASE=ubuntu:24.04 --build-arg PIP_EXTRA_INDEX_URL=... (the CPU index that PyTorch's install page names)
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 privatelora \
 && install --directory --owner privatelora /cache /keys /keys/ca /keys/cloud /keys/edge

WORKDIR /app
COPY Makefile pyproject.toml README.md LICENSE ./
COPY shared shared
COPY cloud_server cloud_server

# Which build of PyTorch this is decides whether the image can use a GPU.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL=
RUN make install VENV=/opt/privatelora EXTRAS=cloud TORCH="${TORCH}" \
 && rm -rf /root/.cache

# Runs with a read-only root: what is written goes to /cache (models, A and B: keep it) and /tmp.
USER 10001
# hadolint ignore=DL3064
ENV PATH=/opt/privatelora/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PRIVATELORA_CACHE_DIR=/cache \
    HF_HOME=/cache/huggingface \
    PRIVATELORA_CLOUD_LISTEN=0.0.0.0:50051 \
    PRIVATELORA_CLOUD_HEALTH=127.0.0.1:50052
VOLUME /cache
EXPOSE 50051
# gRPC's health check, at a port of its own: a probe knows neither certificates nor tokens.
HEALTHCHECK --interval=10s --timeout=10s --start-period=10m \
  CMD ["privatelora-cloud", "health", "--at", "127.0.0.1:50052"]
ENTRYPOINT ["privatelora-cloud"]
CMD ["serve", "--model", "smollm2-135m-instruct"]
