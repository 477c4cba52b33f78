# An environment for development: the tools and packages of make lint and make test, for your user, over your checkout.
#   docker build -t lightning-rlhf-dev .
#   docker run --rm -it -v "$PWD:/work" --shm-size 2g lightning-rlhf-dev make test-fast VENV=/opt/venv
# Add --gpus all, and build with another TORCH, for a card. It copies setup files alone: your checkout is mounted.
FROM python:3.11-slim
ARG TORCH="torch==2.13.0"
# gcc and g++: torch.compile and ColossalAI's kernels; git: make lint
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY Makefile setup.py setup.cfg pyproject.toml constraints*.txt README.md LICENSE ./
COPY configs configs
COPY lightning_rlhf lightning_rlhf
RUN make install VENV=/opt/venv TORCH="$TORCH" && chmod -R a+rwX /opt/venv
ENV PATH=/opt/venv/bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
CMD ["bash"]
