# The edge side on the GPU of a Jetson Orin (JetPack 6); on its processor alone the plain edge.Dockerfile (arm64) is
# enough, and often as fast. Build on the Jetson, from the repository's root:
#   docker build -f docker/edge.jetson.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=... -t privatelora-edge-jetson .
#   docker run --rm -it --runtime nvidia --network host -v privatelora-edge:/data privatelora-edge-jetson \
#     chat --cloud cloud.example:50051 --tls --device cuda
# PIP_EXTRA_INDEX_URL is the index with PyTorch for this JetPack, which NVIDIA's Jetson AI Lab names: the public one has
# no build for Jetson's GPU. No one here has a Jetson: this file is linted, and has not been built.
FROM nvcr.io/nvidia/l4t-cuda:12.6.11-runtime

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make python3 python3-venv libopenblas0 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 --groups video privatelora \
 && install --directory --owner privatelora /data /keys

WORKDIR /app
COPY Makefile pyproject.toml README.md LICENSE ./
COPY shared shared
COPY edge_client edge_client

ARG PIP_EXTRA_INDEX_URL=
ARG TORCH=torch==2.13.0
RUN make install VENV=/opt/privatelora EXTRAS=edge TORCH="${TORCH}" \
 && rm -rf /root/.cache

# Runs with a read-only root: what is written goes to /data (parts of models, adapters, known clouds: keep it) and /tmp.
USER 10001
# hadolint ignore=DL3064
ENV PATH=/opt/privatelora/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HOME=/data/cache/huggingface \
    PRIVATELORA_CACHE_DIR=/data/cache \
    PRIVATELORA_CONFIG_DIR=/data/config \
    PRIVATELORA_DATA_DIR=/data
VOLUME /data
ENTRYPOINT ["privatelora-edge"]
CMD ["--help"]
