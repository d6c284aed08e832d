# Two images from one tree: `docker build --target server .` carries no torch, `--target worker .` carries it.
# Where this was written there was no Docker engine: tests hold its facts, but no image has been built from it there.

FROM python:3.11-slim-bookworm AS tree
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
RUN useradd --system --create-home zimage && install --directory --owner=zimage /app/var
COPY pyproject.toml ./
COPY config config

FROM tree AS server
RUN pip install -c config/requirements.lock '.[server]'
COPY . .
USER zimage
EXPOSE 8000
CMD ["python", "-m", "server"]

FROM tree AS worker
# torch.compile calls a C++ compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install -c config/requirements.lock '.[worker]'
COPY . .
USER zimage
CMD ["python", "-m", "worker"]
