"""Settings that must stand before torch, numba and transformers are imported."""

import os
from pathlib import Path

from hypothesis import settings

# the same examples in every run: a red test means a change, and not a throw of the dice
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# two test workers share two cores
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# no test reaches for a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# whole lines of help and errors, plain, however wide the terminal is
os.environ["COLUMNS"] = "120"
os.environ["NO_COLOR"] = "1"
os.environ.pop("FORCE_COLOR", None)
# without a GPU, Triton kernels run under its interpreter
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
