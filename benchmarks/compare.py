"""Whether two outputs hold the same weights: `same` byte for byte, `near` to bfloat16's rounding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

# PEFT rounds the delta to bfloat16 before it adds, and the sum again: two roundings of 2^-9 where we
# have one, of values below 1/8
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-12


def compare(ours: Path, theirs: Path, how: str) -> None:
    """Raises AssertionError at the first tensor that differs."""
    files = [next(path.glob("*.safetensors")) for path in (ours, theirs)]
    with safe_open(files[0], "pt") as a, safe_open(files[1], "pt") as b:
        assert set(a.keys()) == set(b.keys()), set(a.keys()) ^ set(b.keys())
        for name in a.keys():  # noqa: SIM118 - a safetensors file is no dict
            x, y = a.get_tensor(name), b.get_tensor(name)
            if ".quant_state." in name:
                assert json.loads(bytes(x.tolist())) == json.loads(bytes(y.tolist())), name
            elif how == "same":
                assert torch.equal(x.flatten(), y.flatten()), name
            else:
                assert torch.allclose(x.float(), y.float(), RELATIVE, ABSOLUTE), name


if __name__ == "__main__":
    compare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
