"""ONNX Runtime's adapter.onnx_adapter: named parameters, which a session takes in place of a model's own.

Names are module path + `.lora_A.weight` [in, r] and `.lora_B.weight` [r, out], as x meets them: y += x A B. There
is no alpha: the scale is baked into B. A model takes these parameters if its graph has inputs of these names.
The file is written and read by onnxruntime.AdapterFormat, which holds all parameters in memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.dialects import _one_file, _sayable
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("lora",)

SUFFIX = ".onnx_adapter"
_MAGIC = b"TORT"  # a flatbuffer's file identifier, at byte 4
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.weight)?")
# onnxruntime's types that a factor may have, and how a dialect names them
_FLOATS = {"tensor(float)": "F32", "tensor(float16)": "F16"}
_OTHERS = {
    "tensor(double)": "F64",
    "tensor(int64)": "I64",
    "tensor(int32)": "I32",
    "tensor(bfloat16)": "BF16",
}


def detect(path: Path) -> bool:
    """One .onnx_adapter file with the format's identifier."""
    file = _one_file.find(path, SUFFIX)
    if file is None:
        return False
    with file.open("rb") as opened:
        return opened.read(8)[4:] == _MAGIC


def read(path: Path) -> Adapter:
    """The adapter's sites; onnxruntime maps the whole file."""
    file = _one_file.find(path, SUFFIX)
    if file is None:
        raise FormatError(f"{path}: is no {SUFFIX} file, and holds not exactly one. Name the file.")
    pairs: dict[str, dict[str, Any]] = defaultdict(dict)
    sites, problems = [], []
    for name, value in sorted(_parameters(file).items()):
        match = _NAME.fullmatch(name)
        if match is None or value.data_type() not in _FLOATS:
            problems.append(
                Problem(
                    name, f"{name} {value.data_type()} {list(value.shape())} is no factor of a LoRA"
                )
            )
        else:
            pairs[match["module"]][match["letter"]] = (name, value)
    for module, factors in pairs.items():
        found = _site(module, factors)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sites.append(found)
    return Adapter(
        path=path,
        dialect="ort_adapter",
        base=None,
        sites=tuple(sites),
        replaced={},
        added={},
        load=_one_file.nothing,
        load_added=_one_file.nothing,
        problems=tuple(problems),
    )


class Parameters:
    """The file as a checkpoint: names and facts alone, for factors are read by the adapter's sites."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.path, self._infos = path, dict(infos)
        self.metadata: Mapping[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """One parameter as it is stored."""
        found: Array = _parameters(self.path)[name].numpy()[start:stop]
        return found

    def release(self, name: str) -> None:
        """Nothing is held."""

    def place(self, name: str) -> None:
        """None: onnxruntime alone knows where in the file it lies."""

    def storage(self, name: str) -> tuple[str, int]:
        info = self._infos[name]
        return info.dtype, info.nbytes


def stored(path: Path) -> Parameters:
    """All parameters of the file, as they are stored. Raises FormatError for a broken one."""
    file = _one_file.find(path, SUFFIX)
    assert file is not None, path
    types = {**_FLOATS, **_OTHERS}
    infos = {
        name: TensorInfo(name, types.get(value.data_type(), "U8"), tuple(value.shape()))
        for name, value in sorted(_parameters(file).items())
    }
    return Parameters(file, infos)


def write(adapter: Adapter, folder: Path) -> None:
    """adapter.onnx_adapter. Raises FormatError for what x A B cannot say."""
    from onnxruntime import AdapterFormat, OrtValue

    _sayable.joined(adapter, "ONNX Runtime")
    _sayable.check(adapter, "ONNX Runtime", VARIANTS)
    if site := next((s for s in adapter.sites if s.kernel), None):
        raise FormatError(
            f"{adapter.path}: {site.module} is a convolution, which x A B is not. Merge it."
        )
    parameters = {}
    for site in adapter.sites:
        a, b = _stored(site)
        parameters[f"{site.module}.lora_A.weight"] = OrtValue.ortvalue_from_numpy(a)
        parameters[f"{site.module}.lora_B.weight"] = OrtValue.ortvalue_from_numpy(b)
    made = AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(parameters)
    made.export_adapter(str(folder / f"adapter{SUFFIX}"))


def _parameters(file: Path) -> Mapping[str, Any]:
    from onnxruntime import AdapterFormat

    try:
        found: Mapping[str, Any] = AdapterFormat.read_adapter(str(file)).get_parameters()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FormatError(
            f"{file}: onnxruntime cannot read it ({reason}). Restore the file."
        ) from None
    return found


def _site(module: str, factors: Mapping[str, tuple[str, Any]]) -> Site | Problem:
    some = next(iter(factors.values()))[0]
    if len(factors) < 2:
        return Problem(some, f"{some} stands alone: {module} needs lora_A and lora_B")
    (a_name, a), (b_name, b) = factors["A"], factors["B"]
    if not len(a.shape()) == len(b.shape()) == 2 or a.shape()[1] != b.shape()[0]:
        return Problem(
            some, f"{module}: A {list(a.shape())} and B {list(b.shape())} are no factors for x A B"
        )
    (in_, rank), out = a.shape(), b.shape()[1]
    if rank == 0:
        return Problem(some, f"{module}: A {list(a.shape())} is of rank 0 and does nothing")
    facts = {
        "A": TensorInfo(a_name, "F32", (rank, in_)),
        "B": TensorInfo(b_name, "F32", (out, rank)),
    }
    config = AdapterConfig("lora", rank, float(rank))
    return Site(module, "weight", "linear", config, facts, _reader(a, b))


def _reader(a: Any, b: Any) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        import numpy as np

        found = {"A": a.numpy(), "B": b.numpy()}
        return {name: np.ascontiguousarray(f.T, np.float32) for name, f in found.items()}

    return load


def _stored(site: Site) -> tuple[Array, Array]:
    """A [in, r] and B [r, out] with the scale in it; float16 stays, all else is float32."""
    import numpy as np

    found = site.load()
    scaled = {"A": found["A"], "B": found["B"] * np.float32(site.config.scaling)}
    half = {name: site.factors[name].dtype == "F16" for name in scaled}
    a, b = (
        np.ascontiguousarray(f.T, np.float16 if half[name] else np.float32)
        for name, f in scaled.items()
    )
    return a, b
