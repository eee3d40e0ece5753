"""Writing llama.cpp's adapter: the base's names and row order, one alpha, the rest of the scale in B."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Site
from lorasurgery.dialects import _sayable
from lorasurgery.errors import FormatError
from lorasurgery.formats import _gguf_names as names
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# what is known of a tensor, and what gives it as it is stored
Tensor = tuple[TensorInfo, Callable[[], "Array"]]


def write(adapter: Adapter, file: Path) -> None:
    """Float32, float16 or bfloat16, one tensor in memory at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    from lorasurgery.arrays import NUMPY

    _sayable.joined(adapter, "llama.cpp")
    _sayable.check(adapter, "llama.cpp", ("lora",), ("linear", "embedding"))
    architecture, family = _family(adapter)
    alpha = _alpha(adapter)
    tensors = [t for site in adapter.sites for t in _tensors(adapter, site, family, alpha)]
    writer = GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if adapter.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base)
    if family.paired:
        heads = {role: _heads(adapter, role) for role in "qk"}
        writer.add_head_count(heads["q"])
        writer.add_head_count_kv(heads["k"])
    for info, _ in tensors:
        kind = GGMLQuantizationType[info.dtype]
        writer.add_tensor_info(info.name, info.shape, NUMPY[info.dtype], info.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, load in tensors:
        writer.write_tensor_data(load())
    writer.close()


def _family(adapter: Adapter) -> tuple[str, names.Family]:
    """GGUF's architecture of the base."""
    kind = adapter.base_config.get("model_type")
    architecture = names.architecture_of(kind)
    if architecture is not None:
        return architecture, names.FAMILIES[architecture]
    if kind is None:
        raise FormatError(
            f"{adapter.path}: a GGUF adapter names tensors and orders rows as its base does, whose "
            "config.json is not given. Give the base."
        )
    known = ", ".join(family.model_type for family in names.FAMILIES.values())
    raise FormatError(
        f"{adapter.path}: the base is a {kind}, whose GGUF names are not known. Known: {known}."
    )


def _alpha(adapter: Adapter) -> float:
    """The most common alpha of those that need nothing baked in."""
    plain = [s.config.alpha for s in adapter.sites if not s.config.rank_stabilized]
    counted = Counter(alpha for alpha in plain if alpha > 0).most_common(1)
    return float(counted[0][0]) if counted else 1.0


def _tensors(adapter: Adapter, site: Site, family: names.Family, alpha: float) -> Iterator[Tensor]:
    name = _name(adapter, site, family)
    rank = site.config.rank
    scale = site.config.scaling / (alpha / rank)
    role = names.paired_role(name, family)
    heads = _heads(adapter, role) if role else None
    a, b = site.factors["A"].shape, site.factors["B"].shape
    if heads is not None and b[0] % (2 * heads):
        raise FormatError(
            f"{adapter.path}: {site.module}: B has {b[0]} rows, which are not {heads} heads of an even "
            "size. Check the base."
        )
    if site.kernel:
        raise FormatError(
            f"{adapter.path}: {site.module} is a convolution, which llama.cpp cannot adapt. Merge it."
        )
    if site.layout == "embedding":
        yield _info(site, "B", f"{name}.lora_a", b), _loader(site, "B", scale)
        yield _info(site, "A", f"{name}.lora_b", a[::-1]), _loader(site, "A")
    else:
        yield _info(site, "A", f"{name}.lora_a", a), _loader(site, "A")
        yield _info(site, "B", f"{name}.lora_b", b), _loader(site, "B", scale, heads)


def _info(site: Site, factor: str, name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, site.factors[factor].dtype, shape)


def _name(adapter: Adapter, site: Site, family: names.Family) -> str:
    """The base's tensor. Raises for what llama.cpp has no tensor for."""
    live = f"{site.module}.{site.parameter}"
    live = live if live.startswith(("model.", "lm_head.")) else f"model.{live}"
    name = names.gguf(live, family)
    if name is None:
        raise FormatError(
            f"{adapter.path}: {site.module} has no tensor in GGUF's {family.model_type}. Merge it, or "
            "leave it out."
        )
    if live == "lm_head.weight" and adapter.base_config.get("tie_word_embeddings"):
        raise FormatError(
            f"{adapter.path}: lm_head is adapted, but the base ties it to the embedding, and its GGUF has "
            "no tensor of that name. Merge it, or leave it out."
        )
    return name


def _heads(adapter: Adapter, role: str) -> int:
    heads = names.heads_of(adapter.base_config, role)
    if heads is None:
        raise FormatError(
            f"{adapter.path}: the base's config.json does not say how many heads it has, after which "
            "llama.cpp orders the rows of q and k. Give the base."
        )
    return heads


def _loader(
    site: Site, factor: str, scale: float = 1.0, heads: int | None = None
) -> Callable[[], Array]:
    def load() -> Array:
        import numpy as np

        from lorasurgery.arrays import NUMPY

        found = site.load()[factor]
        if site.layout == "embedding" and factor == "A":
            found = found.T
        found = found if scale == 1.0 else found * np.float32(scale)
        if heads is not None:
            ordered = np.empty_like(found)
            ordered[names.paired_rows(0, len(found), len(found) // heads)] = found
            found = ordered
        dtype = NUMPY[site.factors[factor].dtype]
        data = np.ascontiguousarray(found).astype(dtype, copy=False)
        # the writer asks numpy for the byte order, which is no word of bfloat16's
        return data.view(np.uint16) if data.dtype.itemsize == 2 else data

    return load
