"""What all tests share: Triton's interpreter where there is no GPU, and hypothesis without deadlines."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined, so before any test imports one. Whoever compiles drops it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A process that measures takes seconds to start: tests of it ask for it.
os.environ.setdefault("TM_GEMM_SANDBOX", "0")

settings.register_profile("tilecast", deadline=None)
settings.load_profile("tilecast")
