"""What the server of tests/ranks.py imports once: torch and DeepSpeed, for the CPU, without dynamo or a C++ build."""

import os
import sys
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.comm

import torch.distributed

import ldm.models.autoencoder
import ldm.models.unet
import ldm.train.engine  # noqa: F401

assert torch.distributed.is_available()
assert deepspeed.__version__
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
