"""What every test shares: one thread per process, no network, quiet libraries."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FEDLLM_CACHE", tempfile.mkdtemp(prefix="fedllm-tests-"))  # what is timed here stays here

from hypothesis import settings

settings.register_profile("fedllm", deadline=None)  # a busy machine is no fault
settings.load_profile("fedllm")
