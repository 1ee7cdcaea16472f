"""What the server of tests/ranks.py imports once, for the CPU: torch and DeepSpeed, without dynamo or a C++ build.

open_clip too: its import takes longer than most of what a rank does, and every rank that loads a whole model needs it.
"""

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

import open_clip.tokenizer
import open_clip.transformer  # noqa: F401
import torch.distributed

import ldm.models.unet
import ldm.models.vae.autoencoder
import ldm.train.engine  # noqa: F401

assert torch.distributed.is_available()
assert deepspeed.__version__
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
