# syntax=docker/dockerfile:1
# Two images from one file:
#   server   API, scheduler, migrations and keys; no torch, no transformers
#   worker   labels and trains
#
#   docker build --target server -t understudy-server .
#   docker build --target worker -t understudy-worker .
#   docker build --target worker -t understudy-worker:gpu --build-arg TORCH_INDEX_URL=https://pypi.org/simple .
#
# The base is pinned by version. To pin its content as well, append the digest that
# `docker buildx imagetools inspect python:3.11.14-slim-bookworm` prints: python:3.11.14-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# --- what both images share -------------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/understudy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    # Uploads are spooled and checkpoints packed here: a disk, because a tmpfs would hold 5 GB uploads in memory.
    TMPDIR=/var/spool/understudy \
    HF_HOME=/var/spool/understudy/huggingface \
    UNDERSTUDY_STORAGE_URL=file:///var/lib/understudy/storage
# A new named volume takes its owner from the directory of the image that it covers.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin understudy \
    && install --directory --owner understudy --group understudy --mode 0700 \
        /var/lib/understudy /var/lib/understudy/storage /var/spool/understudy \
    && python -m venv /opt/understudy
# Not the source's directory: what runs is what was installed, and no .env lies here.
WORKDIR /var/lib/understudy
ENTRYPOINT ["understudy"]

# --- server -----------------------------------------------------------------------------------------------------------

# The dependencies are installed for a project without source first, so that a change of the source does not move them.
FROM base AS server-build
WORKDIR /build
COPY pyproject.toml constraints.txt README.md ./
RUN pip install '.[s3]' -c constraints.txt
COPY app app
COPY migrations migrations
RUN pip install --no-deps --force-reinstall .

FROM base AS server
COPY --from=server-build /opt/understudy /opt/understudy
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=3)"]
CMD ["api", "--host", "0.0.0.0", "--port", "8000"]

# --- worker -----------------------------------------------------------------------------------------------------------

FROM base AS worker-build
# The CPU build by default. https://pypi.org/simple holds the CUDA build of the same version.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY pyproject.toml constraints.txt README.md ./
RUN pip install torch -c constraints.txt --index-url "${TORCH_INDEX_URL}" --extra-index-url https://pypi.org/simple \
    && pip install '.[worker,s3]' -c constraints.txt
COPY app app
COPY workers workers
RUN pip install --no-deps --force-reinstall .

FROM base AS worker
COPY --from=worker-build /opt/understudy /opt/understudy
USER 10001
CMD ["worker", "--queue", "all"]
