# docker build -t ldm . ; docker run --gpus all --shm-size 8g -v "$PWD:/workspace" ldm sample "a red apple"
# PyTorch's wheels bring CUDA; the host needs its driver and the NVIDIA container toolkit.
FROM python:3.12-slim
LABEL org.opencontainers.image.title="ldm" org.opencontainers.image.version="0.1.0"
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ldm
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY ldm ldm
COPY launch launch
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt ".[transformers,bitsandbytes,optimizers,remote,fast,parquet,completion]"
WORKDIR /workspace
ENTRYPOINT ["ldm"]
CMD ["--help"]
