"""What a person types to see into a checkpoint: its config, and each tensor's dtype and shape."""

import sys
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

source = Path(sys.argv[1])
print(AutoConfig.from_pretrained(source))
with safe_open(source / "model.safetensors", "pt") as file:
    for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
        part = file.get_slice(name)
        print(name, part.get_dtype(), part.get_shape())
