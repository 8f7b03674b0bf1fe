# The process that callers talk to. Build from the repository's root:
#   docker build -f deploy/gateway.Dockerfile -t chorus-gateway .
FROM python:3.11.14-slim-bookworm AS build

WORKDIR /src
RUN python -m venv /opt/chorus
ENV PATH=/opt/chorus/bin:$PATH
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .


FROM python:3.11.14-slim-bookworm

RUN useradd --create-home --uid 10001 chorus
COPY --from=build /opt/chorus /opt/chorus
USER 10001:10001
WORKDIR /home/chorus

# CHORUS_SECRET, which gateways and services share, comes from outside: an image is no place for it.
# CHORUS_ADDRESS is where `chorus check` finds this very process.
ENV PATH=/opt/chorus/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CHORUS_GATEWAY_LISTEN=0.0.0.0:50051 \
    CHORUS_GATEWAY_METRICS_LISTEN=0.0.0.0:9451 \
    CHORUS_ADDRESS=127.0.0.1:50051
EXPOSE 50051 9451

# Speaks a word, through a service: a gateway that reaches none is not healthy.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 CMD ["chorus", "check"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["chorus", "gateway"]
