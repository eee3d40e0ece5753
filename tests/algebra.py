"""LoRA adapters written by hand in PEFT's layout, and their changes as dense float64 matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app

PREFIX = "base_model.model."
# out, in, rank, and how large the change is
Module = tuple[int, int, int, float]


def cli(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in this process."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="lorasurgery")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def facts(*arguments: object) -> dict[str, Any]:
    code, stdout, stderr = cli(*arguments, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def fails(*arguments: object) -> tuple[int, str]:
    """Exit code and the one line of the error."""
    code, stdout, stderr = cli(*arguments)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    return code, stderr.removeprefix("error: ").rstrip("\n")


def write_lora(
    path: Path, modules: Mapping[str, Module], *, seed: int = 0, experts: int = 1,
    parameter: str | None = None, **fields: Any,
) -> Path:  # fmt: skip
    """alpha is not the rank; a rank of its own for each module; with `parameter`, stacked experts."""
    path.mkdir()
    rng, held = np.random.default_rng(seed), {}
    for name, (out, in_, rank, size) in modules.items():
        a = rng.standard_normal((rank * experts, in_)).astype(np.float32)
        b = rng.standard_normal((out, rank * experts)).astype(np.float32)
        b *= np.float32(size / np.sqrt(out * in_ * rank))
        dot = "" if parameter else ".weight"
        held[f"{PREFIX}{name}.lora_A{dot}"], held[f"{PREFIX}{name}.lora_B{dot}"] = a, b
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    usual = next(iter(modules.values()))[2]
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "made/by-hand", "r": usual, "lora_alpha": 7,
        "rank_pattern": {n: m[2] for n, m in modules.items() if m[2] != usual},
        "target_modules": None if parameter else list(modules),
        "target_parameters": [f"{n}.{parameter}" for n in modules] if parameter else None, **fields,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def dense(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """A, B as stored, and the scale, by module path: PEFT's rules, as far as these files need them."""
    config = json.loads((path / "adapter_config.json").read_text())
    found = {}
    with safe_open(path / "adapter_model.safetensors", "np") as file:
        keys = {k: file.get_tensor(k) for k in file.keys() if ".lora_" in k}  # noqa: SIM118
    for key, a in keys.items():
        if ".lora_A" not in key:
            continue
        module = key.removeprefix(PREFIX).partition(".lora_A")[0]
        rank = _fitting(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _fitting(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        root = rank**0.5 if config.get("use_rslora") else rank
        found[module] = (a, keys[key.replace("lora_A", "lora_B")], alpha / root)
    return found


def _fitting(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Our files name whole paths; a parameter's path goes on after the module's."""
    for pattern, value in patterns.items():
        if module == pattern.lstrip("^") or pattern.lstrip("^").startswith(f"{module}."):
            return value
    return otherwise


def deltas(path: Path) -> dict[str, np.ndarray]:
    """s B A float64 [out, in] by module path; [experts, out, in] where factors are stacked."""
    config = json.loads((path / "adapter_config.json").read_text())
    found = {}
    for module, (a, b, scale) in dense(path).items():
        a, b = a.astype(np.float64), b.astype(np.float64)  # noqa: PLW2901
        if not config.get("target_parameters"):
            found[module] = scale * b @ a
            continue
        rank = _fitting(config.get("rank_pattern") or {}, module, config["r"])
        # in A the expert varies slowest, in B fastest
        stack = a.reshape(-1, rank, a.shape[1])
        found[module] = scale * b.reshape(len(b), rank, -1).transpose(2, 0, 1) @ stack
    return found


def sizes(path: Path) -> set[str]:
    """The dtypes of a file's tensors."""
    with safe_open(path / "adapter_model.safetensors", "np") as file:
        return {file.get_slice(k).get_dtype() for k in file.keys()}  # noqa: SIM118
