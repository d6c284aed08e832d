# Two images from one tree: `docker build --target server .` contains no torch, `--target worker .` contains it.
# tests/project/test_compose.py checks this file without a Docker engine; no image has been built from it yet.
# The lock has versions but no hashes: one lock serves torch for the CPU and for CUDA, which are different files of one
# version from different indexes, and `--require-hashes` would refuse one of them.

FROM python:3.11-slim-bookworm AS tree
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
# /models holds models from the Hugging Face hub; docker-compose.yml mounts a volume there, and names the user by number.
ENV HF_HOME=/models TRITON_CACHE_DIR=/tmp/triton
RUN useradd --uid 10001 --create-home zimage && install --directory --owner=zimage --mode=0700 /app/var /models
COPY pyproject.toml ./
COPY config config

FROM tree AS server
RUN pip install -c config/requirements.lock '.[server]'
COPY . .
USER zimage
EXPOSE 8000
CMD ["python", "-m", "server"]

FROM tree AS worker
# torch.compile needs a C++ compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install -c config/requirements.lock '.[worker]'
COPY . .
USER zimage
CMD ["python", "-m", "worker"]
