"""A seeded LoRA, DoRA, AdaLoRA or VeRA over every linear layer of a made model, in PEFT's layout, with float32 factors."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.make_model import SHAPES, Shape, linears
from lorasurgery.arrays import Array

RANK, ALPHA = 16, 32
# with A ~ U(-1/√in, 1/√in) as PEFT starts it, ΔW is about 1 % of a weight of N(0, 0.02²)
DEVIATION_OF_B = 2e-3
# the norm of a row of such a weight is about 0.02 √in; a magnitude is that, give or take a hundredth
DEVIATION_OF_M = 1e-2
VERA_RANK = 256  # PEFT's own choice
KINDS = ("lora", "dora", "adalora", "vera")

Factors = dict[str, Array]


def make(shape: Shape, output: Path, kind: str = "lora") -> None:
    """adapter_model.safetensors and adapter_config.json."""
    output.mkdir(parents=True, exist_ok=True)
    factors: Factors = _projections(shape) if kind == "vera" else {}
    for name, (out, in_) in linears(shape).items():
        rng = np.random.default_rng(zlib.crc32(f"{name} lora".encode()))
        made = _vera(rng, out) if kind == "vera" else _lora(rng, out, in_, kind)
        factors |= {f"base_model.model.{name}.{end}": factor for end, factor in made.items()}
    save_file(factors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears(shape)}),
        **_settings(kind),
    }  # fmt: skip
    (output / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _lora(rng: np.random.Generator, out: int, in_: int, kind: str) -> Factors:
    a = (rng.random((RANK, in_), dtype=np.float32) * 2 - 1) / np.float32(in_) ** 0.5
    b = rng.standard_normal((out, RANK), dtype=np.float32) * np.float32(DEVIATION_OF_B)
    if kind == "adalora":
        e = 1 + rng.standard_normal((RANK, 1), dtype=np.float32) / 4
        return {"lora_A": a.astype(np.float32), "lora_B": b, "lora_E": e}
    found = {"lora_A.weight": a.astype(np.float32), "lora_B.weight": b}
    if kind == "dora":
        spread = 1 + DEVIATION_OF_M * rng.standard_normal(out, dtype=np.float32)
        m = np.float32(0.02 * in_**0.5) * spread
        found["lora_magnitude_vector"] = m.astype(np.float32)
    return found


def _projections(shape: Shape) -> Factors:
    """The two that all modules share, as wide as the widest."""
    sizes = linears(shape).values()
    widest_in, widest_out = max(in_ for _, in_ in sizes), max(out for out, _ in sizes)
    rng = np.random.default_rng(0)
    a = rng.standard_normal((VERA_RANK, widest_in), dtype=np.float32) / np.float32(widest_in) ** 0.5
    b = rng.standard_normal((widest_out, VERA_RANK), dtype=np.float32) / np.float32(16)
    return {"base_model.vera_A": a.astype(np.float32), "base_model.vera_B": b}


def _vera(rng: np.random.Generator, out: int) -> Factors:
    d = 0.1 + rng.standard_normal(VERA_RANK, dtype=np.float32) / 50
    b = rng.standard_normal(out, dtype=np.float32) / 50
    return {"vera_lambda_d": d.astype(np.float32), "vera_lambda_b": b}


def _settings(kind: str) -> dict[str, object]:
    if kind == "vera":
        return {"peft_type": "VERA", "r": VERA_RANK, "save_projection": True, "bias": "none"}
    shared = {"lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none"}
    if kind == "adalora":
        # PEFT wants to know how long the training was
        return {
            **shared, "peft_type": "ADALORA", "r": RANK, "init_r": RANK, "target_r": RANK,
            "total_step": 100,
        }  # fmt: skip
    return {**shared, "peft_type": "LORA", "r": RANK, "use_dora": kind == "dora"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="lora")
    options = parser.parse_args()
    make(SHAPES[options.shape], options.output, options.kind)


if __name__ == "__main__":
    main()
