# The process that owns an engine, on a CPU. Build from the repository's root:
#   docker build -f deploy/service-cpu.Dockerfile -t chorus-service:cpu .
FROM python:3.11.14-slim-bookworm AS build

WORKDIR /src
RUN python -m venv /opt/chorus
ENV PATH=/opt/chorus/bin:$PATH
COPY . .
# PyTorch's own index has the builds without CUDA; pip takes them, since `+cpu` is the higher of two equal versions.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    '.[service,chattts]'


FROM python:3.11.14-slim-bookworm

# The model is fetched into .cache at the first start. Mount a volume there to keep it; it is made here so that a new
# volume belongs to the user.
RUN useradd --create-home --uid 10001 chorus \
    && install -d -o chorus -g chorus /home/chorus/.cache
COPY --from=build /opt/chorus /opt/chorus
USER 10001:10001
WORKDIR /home/chorus

# CHORUS_SECRET, which gateways and services share, comes from outside: an image is no place for it.
# CHORUS_ADDRESS is where `chorus check` finds this very process.
ENV PATH=/opt/chorus/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CHORUS_ENGINE=chattts \
    CHORUS_SERVICE_LISTEN=0.0.0.0:50061 \
    CHORUS_SERVICE_METRICS_LISTEN=0.0.0.0:9461 \
    CHORUS_ADDRESS=127.0.0.1:50061
EXPOSE 50061 9461

# Speaks a word. The long start is for fetching and loading the model.
HEALTHCHECK --interval=30s --timeout=20s --start-period=600s --retries=3 CMD ["chorus", "check"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["chorus", "service"]
