"""A seeded LoRA or DoRA over every linear layer of a made model, in PEFT's layout, with float32 factors."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.make_model import SHAPES, Shape, linears

RANK, ALPHA = 16, 32
# with A ~ U(-1/√in, 1/√in) as PEFT starts it, ΔW is about 1 % of a weight of N(0, 0.02²)
DEVIATION_OF_B = 2e-3


# the norm of a row of such a weight is about 0.02 √in; a magnitude is that, give or take a hundredth
DEVIATION_OF_M = 1e-2


def make(shape: Shape, output: Path, *, dora: bool = False) -> None:
    """adapter_model.safetensors and adapter_config.json."""
    output.mkdir(parents=True, exist_ok=True)
    factors = {}
    for name, (out, in_) in linears(shape).items():
        rng = np.random.default_rng(zlib.crc32(f"{name} lora".encode()))
        a = (rng.random((RANK, in_), dtype=np.float32) * 2 - 1) / np.float32(in_) ** 0.5
        b = rng.standard_normal((out, RANK), dtype=np.float32) * np.float32(DEVIATION_OF_B)
        factors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float32)
        factors[f"base_model.model.{name}.lora_B.weight"] = b
        if dora:
            spread = 1 + DEVIATION_OF_M * rng.standard_normal(out, dtype=np.float32)
            m = np.float32(0.02 * in_**0.5) * spread
            factors[f"base_model.model.{name}.lora_magnitude_vector"] = m.astype(np.float32)
    save_file(factors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "use_dora": dora,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears(shape)}),
    }  # fmt: skip
    (output / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dora", action="store_true", help="with magnitudes")
    options = parser.parse_args()
    make(SHAPES[options.shape], options.output, dora=options.dora)


if __name__ == "__main__":
    main()
