"""Settings that must stand before torch, numba and transformers are imported."""

import os
from pathlib import Path

import pytest
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


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written is nan, or 0x7f where there is no nan."""
    import torch

    # torch notes its constructors in the first such block: it must not note those that are put here,
    # or no later `torch.device("meta")` is heeded by what makes a model
    with torch.device("cpu"):
        torch.empty(0)

    def poison(make):
        def made(*args, **options):
            out = make(*args, **options)
            return out.fill_(torch.nan if out.is_floating_point() else 0x7F)

        return made

    for place, name in (
        (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, poison(getattr(place, name)))
