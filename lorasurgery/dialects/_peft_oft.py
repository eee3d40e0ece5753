"""OFT as PEFT stores it since 0.16.

Keys are base_model.model. + module path + .oft_R.weight [blocks, b (b - 1) / 2], of embeddings .oft_embedding_R.weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_form_write as writing
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("oft",)

_SERIES_SINCE = "0.18.0"  # the PEFT whose series the variant has
# the fields that say what the rotations are, and what they are where the config does not say
_MEANING = {
    "block_share": False, "coft": False, "eps": 6e-5, "use_cayley_neumann": False,
    "num_cayley_neumann_terms": 5,
}  # fmt: skip
_KIND = form.Kind(
    "OFT",
    {"oft_R": "R", "oft_embedding_R": "R"},
    frozenset({
        *_MEANING, "r", "oft_block_size", "bias", "fan_in_fan_out", "module_dropout",
        "init_weights",
    }),
)  # fmt: skip


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks. Raises FormatError for OFT of before 0.16, which was another one."""
    if "oft_block_size" not in config:
        raise FormatError(
            f"{path / 'adapter_config.json'}: OFT without oft_block_size is of PEFT before 0.16, whose "
            "blocks meant something else. Train it anew, or merge it with that PEFT."
        )
    extra = {name: config.get(name, value) for name, value in _MEANING.items()}

    def sites(module: str, keys: form.Keys) -> list[Site] | Problem:
        info = keys["R"]
        size = _block_size(info.shape[1]) if len(info.shape) == 2 else 0
        if not size or (extra["block_share"] and info.shape[0] != 1):
            return Problem(
                info.name, f"{module}: oft_R {list(info.shape)} is not what is above the diagonals of "
                "square blocks",
            )  # fmt: skip
        embedding = "oft_embedding_R" in info.name
        blocks = info.shape[0]
        said = AdapterConfig("oft", blocks, float(blocks), extra={**extra, "embedding": embedding})
        facts = {"R": TensorInfo(info.name, "F32", info.shape)}
        # one block for all: how often it stands there is the base's
        in_ = None if extra["block_share"] else blocks * size
        return [
            Site(
                module, "weight", "embedding" if embedding else "linear", said, facts,
                lambda: {"R": form.loaded(source, info.name)}, sides=(None, in_),
            )
        ]  # fmt: skip

    adapter = form.read(path, config, source, _KIND, sites)
    return _dated(adapter, config)


def write(adapter: Adapter, folder: Path) -> None:
    """As peft.Form asks. Raises FormatError for blocks that differ in number and in size."""
    # what a file does not say is false, and what a site does not say the variant's own
    usual = {**_MEANING, "use_cayley_neumann": True}
    fields = {n: writing.one_of_all(adapter, n, value) for n, value in usual.items()}
    if fields["use_cayley_neumann"]:  # which series it is goes by PEFT's version
        fields["peft_version"] = adapter.settings.get("peft_version") or _SERIES_SINCE
    writing.write(adapter, folder, _KIND, {**fields, **_blocks(adapter)}, _stored)


def _blocks(adapter: Adapter) -> dict[str, int]:
    """PEFT is told the number of blocks, or their size, and finds the other."""
    said = {name: adapter.settings.get(name) for name in ("r", "oft_block_size")}
    if adapter.settings.get("peft_type") == "OFT" and all(
        isinstance(n, int) for n in said.values()
    ):
        return {name: int(n or 0) for name, n in said.items()}
    shapes = [site.factors["R"].shape for site in adapter.sites]
    sizes = {_block_size(shape[1]) for shape in shapes}
    numbers = {shape[0] for shape in shapes}
    if len(sizes) == 1:
        return {"r": 0, "oft_block_size": sizes.pop()}
    if len(numbers) == 1 and not writing.one_of_all(adapter, "block_share", otherwise=False):
        return {"r": numbers.pop(), "oft_block_size": 0}
    raise FormatError(
        f"{adapter.path}: blocks of {sorted(sizes)} differ in number too, for which PEFT's OFT has one "
        "field. Write two adapters."
    )


def _stored(site: Site) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    end = "oft_embedding_R" if site.layout == "embedding" else "oft_R"
    yield f"{end}.weight", *writing.factor(site, site.factors["R"], "R", turned=False)


def _block_size(elements: int) -> int:
    """The b with b (b - 1) / 2 elements above its diagonal; 0 if there is none."""
    size: int = plugins.load("adapters", "oft").block_size(elements)
    return size


def _dated(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """With a problem where PEFT was so old that its series had another last term."""
    if not config.get("use_cayley_neumann"):
        return adapter
    said = str(config.get("peft_version") or "0.0.0").partition("@")[0]
    try:
        old = Version(said) < Version(_SERIES_SINCE)
    except InvalidVersion:
        old = True
    if not old:
        return adapter
    message = (
        f"peft_version {config.get('peft_version')!r} with use_cayley_neumann: before 0.18 the series "
        "had another last term"
    )
    return replace(adapter, problems=(*adapter.problems, Problem("peft_version", message)))
