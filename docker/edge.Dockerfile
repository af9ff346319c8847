# The edge side: text, tokenizer, embeddings, head, M, decoding loop. No GPU and no checkpoint needed.
# Build from the repository's root, for one kind of processor or several:
#   docker build -f docker/edge.Dockerfile -t privatelora-edge .
#   docker buildx build --platform linux/amd64,linux/arm64 -f docker/edge.Dockerfile -t privatelora-edge .
#   docker run --rm -it --network host -v privatelora-edge:/data privatelora-edge chat --cloud 127.0.0.1:50051
# The set-up is the Makefile's own. docker/edge.jetson.Dockerfile is for the GPU of a Jetson.
FROM python:3.11-slim

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 privatelora \
 && install --directory --owner privatelora /data /keys

WORKDIR /app
COPY Makefile pyproject.toml README.md LICENSE ./
COPY shared shared
COPY edge_client edge_client

# pip's default build of PyTorch brings 4 GB of CUDA libraries, which an edge does not need; without them:
#   --build-arg PIP_EXTRA_INDEX_URL=... (the CPU index that PyTorch's install page names)
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
