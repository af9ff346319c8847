# The cloud side: frozen decoder layers, A and B, KV cache. Build from the repository's root:
#   docker build -f docker/cloud.Dockerfile -t privatelora-cloud .
#   docker run --gpus all -p 127.0.0.1:50051:50051 -v privatelora-cache:/cache privatelora-cloud --device cuda --dtype bfloat16 --allow-plaintext --allow-anonymous
# The set-up is the Makefile's own. In a container the cloud listens beyond loopback, so it asks for TLS and tokens or
# a client CA (docs/security.md); the two flags lift that, and are right only where the port is published on loopback.
FROM python:3.11-slim

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 privatelora \
 && install --directory --owner privatelora /cache

WORKDIR /app
COPY Makefile pyproject.toml README.md LICENSE ./
COPY shared shared
COPY cloud_server cloud_server

# Which build of PyTorch this is decides whether the image can use a GPU.
ARG TORCH=torch==2.13.0
RUN make install VENV=/opt/privatelora EXTRAS=cloud TORCH="${TORCH}" \
 && rm -rf /root/.cache

USER 10001
# hadolint ignore=DL3064
ENV PATH=/opt/privatelora/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    PRIVATELORA_CACHE_DIR=/cache \
    PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 50051
# The port is open once the model is loaded; a gRPC probe would have to know the certificates.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
  CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 50051), 4).close()"]
ENTRYPOINT ["privatelora-cloud", "serve", "--listen", "0.0.0.0:50051"]
CMD ["--model", "smollm2-135m-instruct"]
