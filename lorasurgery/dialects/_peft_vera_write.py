"""Writing VeRA as PEFT reads it, with the hashes of the projections in the file's metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, BaseFacts, Site
from lorasurgery.dialects import _one_file
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_form_write as writing
from lorasurgery.dialects._peft_lora_write import PREFIX, Stored, save, wholes
from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

KIND = form.Kind(
    "VERA",
    {"vera_lambda_b": "b", "vera_lambda_d": "d"},
    frozenset({
        "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights",
        "bias", "fan_in_fan_out",
    }),
)  # fmt: skip
SHARED = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


def write(adapter: Adapter, folder: Path) -> None:
    """Projections are stored but where the settings say that they were not."""
    if adapter.complete:  # what is stored of its projections is as much as is written
        adapter = adapter.complete(BaseFacts({}, lambda _: {}, _one_file.nothing))
    a, b = _projections(adapter)
    tensors: dict[str, Stored] = {}
    for site in adapter.sites:
        for name, end in (("b", "vera_lambda_b"), ("d", "vera_lambda_d")):
            key = f"{PREFIX}{site.module}.{end}"
            tensors[key] = (TensorInfo(key, "F32", site.factors[name].shape), _vector(site, name))
    keep = adapter.settings.get("save_projection") is not False
    for name, matrix in (("A", a), ("B", b)) if keep else ():
        tensors[SHARED[name]] = (TensorInfo(SHARED[name], "F32", matrix.shape), _given(matrix))
    fields = {
        "r": len(a),
        "save_projection": keep,
        "projection_prng_key": adapter.settings.get("projection_prng_key", 0),
        "fan_in_fan_out": any(site.fan_in_fan_out for site in adapter.sites),
    }
    noted = {
        f"vera_{n}.sha256": hashlib.sha256(m.tobytes()).hexdigest() for n, m in (("A", a), ("B", b))
    }
    config = {**writing.config_of(adapter, KIND), **fields}
    save(folder, config, tensors | dict(wholes(adapter)), noted)


def _projections(adapter: Adapter) -> tuple[Array, Array]:
    """A [r, max_in] and B [max_out, r]. Raises FormatError unless all sites share them."""
    import numpy as np

    if not adapter.sites:
        raise FormatError(f"{adapter.path}: has no sites to write. Name another adapter.")
    given: Any = adapter.sites[0].config.extra.get("projections")
    loaded = [site.load() for site in adapter.sites]
    a = max((f["A"] for f in loaded), key=lambda m: m.shape[1])
    b = max((f["B"] for f in loaded), key=len)
    a, b = given() if given else (a, b)
    for site, of in zip(adapter.sites, loaded, strict=True):
        same_a = np.array_equal(of["A"], a[:, : of["A"].shape[1]])
        if not same_a or not np.array_equal(of["B"], b[: len(of["B"])]):
            raise FormatError(
                f"{adapter.path}: {site.module} has projections of its own, but in VeRA all modules "
                "share them. Convert it to LoRA."
            )
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def _vector(site: Site, name: str) -> Callable[[], Array]:
    return lambda: site.load()[name]


def _given(matrix: Array) -> Callable[[], Array]:
    return lambda: matrix
