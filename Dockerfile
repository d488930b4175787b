# syntax=docker/dockerfile:1

# Everything in one container: embedded Postgres, MLflow, web and evaluator.
#
#   docker build -t agent-gateway .
#   docker run --rm -v gateway:/var/lib/gateway agent-gateway gateway keys create my-app
#   docker run --init -p 127.0.0.1:8000:8000 -p 127.0.0.1:5000:5000 -v gateway:/var/lib/gateway agent-gateway
#
# The first command prints an API key: without one the second refuses to start, unless it gets -e
# GATEWAY_ALLOW_ANONYMOUS=1. MLflow knows no keys: publish its port, 5000, on loopback only.
#
# With a Postgres of your own, pass -e GATEWAY_DATABASE_URL=postgresql://user:password@host/gateway: the embedded one is
# not started then. MLflow keeps its data in database `mlflow` on the same server. The volume still holds the secret key
# (or pass GATEWAY_SECRET_KEY) and MLflow's artifacts.

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE gateway.toml ./
COPY gateway gateway
COPY agents agents
COPY scorers scorers
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.11-slim
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /dist/agent_gateway-*.whl)[all]" \
    && rm /tmp/constraints.txt

# Postgres does not run as root; as this user it needs nothing special.
RUN useradd --system --uid 10001 --create-home --home-dir /home/gateway gateway \
    && install -d -o gateway -g gateway -m 0700 /var/lib/gateway
WORKDIR /app
COPY agents agents
COPY scorers scorers
COPY gateway.toml ./

USER gateway
ENV GATEWAY_HOME=/var/lib/gateway \
    GATEWAY_HOST=0.0.0.0 \
    GATEWAY_MLFLOW_HOST=0.0.0.0
VOLUME /var/lib/gateway
EXPOSE 8000 5000
# 30 s: MLflow makes its tables on the first start.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ping', timeout=2)"]
# `docker stop` waits for 10 s by default; give it --time 60, so that traces under way are handed over.
CMD ["gateway", "serve"]
