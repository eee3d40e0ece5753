"""Two adapters of one model held to each other, in plain numpy: the relative error of each, and which is larger.

Of a conversion, the change B A that both should be is the peer's; of an extraction, it is the fine-tuned
model's weight less the base's. Prints JSON; exits with an error where ours is further off than it may be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lorasurgery.arrays import Array

# PEFT finds by a float32 SVD what we write down; what is left of it is that SVD's rounding
SAME = 1e-4
# both are written in bfloat16; a subspace found from random directions is nearly the best one
NEARLY = 1.001

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F32": np.dtype("<f4"), "BF16": BFLOAT16}


def tensors(path: Path) -> dict[str, Array]:
    """All of a safetensors file, float32 when it is used."""
    raw = np.memmap(path, np.uint8, "r")
    length = int(raw[:8].view("<u8")[0])
    header: dict[str, Any] = json.loads(bytes(raw[8 : 8 + length]))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = (8 + length + at for at in entry["data_offsets"])
        found[name] = raw[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def wide(array: Array) -> Array:
    return np.asarray(array, np.float32)


def changes(path: Path) -> dict[str, Array]:
    """Module -> its B A; the scaling is 1 in all that is compared here."""
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"], config
    assert config.get("rank_pattern") == config.get("alpha_pattern"), config
    assert not config.get("use_rslora"), config
    held = tensors(path / "adapter_model.safetensors")
    prefix, a, b = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
    names = [n.removeprefix(prefix).removesuffix(a) for n in held if n.endswith(a)]
    return {n: wide(held[prefix + n + b]) @ wide(held[prefix + n + a]) for n in names}


def wanted(paths: list[Path], theirs: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """What each module's change should be."""
    if not paths:
        yield from theirs.items()
        return
    base, tuned = (tensors(path / "model.safetensors") for path in paths)
    for name in theirs:
        key = f"{name}.weight"
        yield name, wide(tuned[key]) - wide(base[key])


def errors(ours: Path, theirs: Path, models: list[Path]) -> tuple[float, float]:
    """Of each adapter, relative, over all modules."""
    one, other = changes(ours), changes(theirs)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    sums = np.zeros(3)
    for name, change in wanted(models, other):
        for k, matrix in enumerate((change - one[name], change - other[name], change)):
            sums[k] += float(np.square(matrix, dtype=np.float64).sum())
    return float((sums[0] / sums[2]) ** 0.5), float((sums[1] / sums[2]) ** 0.5)


def main() -> None:
    ours, theirs, *models = map(Path, sys.argv[1:])
    found = errors(ours, theirs, models)
    assert found[0] <= (NEARLY * found[1] if models else SAME), found
    print(json.dumps(found))


if __name__ == "__main__":
    main()
