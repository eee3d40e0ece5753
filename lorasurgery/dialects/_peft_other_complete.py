"""What adapters of PEFT's other types lack until their base is known: sizes, an order, a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, BaseFacts, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_lora_config
from lorasurgery.dialects._peft_lora_write import PREFIX
from lorasurgery.errors import MatchError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

    from lorasurgery.arrays import Array

# what is shared, by the side of the widest module that it is as long as: (name, dimension)
_WIDEST = {
    "RANDLORA": (("randlora_B", 0), ("randlora_A", 2)),
    "PVERA": (("pvera_B", 0), ("pvera_A", 1)),
}


def incomplete(adapter: Adapter, source: Checkpoint, shared: Mapping[str, TensorInfo]) -> Adapter:
    """The adapter with what completes it, if anything must."""
    kind = str(adapter.settings["peft_type"]).upper()
    if kind in _WIDEST:
        stored = [shared.get(f"/base_model.{name}") for name, _ in _WIDEST[kind]]
        sizes = [
            info.shape[at]
            for info, (_, at) in zip(stored, _WIDEST[kind], strict=True)
            if info is not None and len(info.shape) > at
        ]
        if len(sizes) == len(stored):
            return _with(adapter, lambda _: {"widest": tuple(sizes)})
        return _waiting(adapter, "its projections are drawn for the widest module", _widest)
    if kind == "FROD" and not shared:
        raise MatchError(
            f"{adapter.path}: save_projection is false: frod_V is made of the base's weights of all layers "
            "at once. Save it with its projections."
        )
    if kind == "TINYLORA":
        return _waiting(adapter, "its vectors go by the order of the modules", _tinylora)
    if kind == "UNILORA" and not adapter.sites:
        complete = _unilora(source, shared)
        return replace(adapter, complete=lambda base: complete(adapter, base))
    if any(site.config.extra.get("biased") for site in adapter.sites):
        return _waiting(
            adapter, "its change of a bias is made of the weight", _weights, only="bias"
        )
    return adapter


def _waiting(
    adapter: Adapter, reason: str, complete: Callable[[Adapter, BaseFacts], Adapter], only: str = ""
) -> Adapter:
    message = f"{adapter.path}: {reason}, which only the base tells. Name the base."
    marked = _with(
        adapter,
        lambda site: {"incomplete": message} if only in ("", site.parameter) else {},
    )
    return replace(marked, complete=lambda base: replace(complete(adapter, base), complete=None))


def _with(adapter: Adapter, facts: Callable[[Site], Mapping[str, object]]) -> Adapter:
    def changed(site: Site) -> Site:
        extra = {**site.config.extra, **facts(site)}
        return replace(site, config=replace(site.config, extra=extra))

    return replace(adapter, sites=tuple(map(changed, adapter.sites)))


def _widest(adapter: Adapter, base: BaseFacts) -> Adapter:
    found = base.shapes([f"{site.module}.weight" for site in adapter.sites])
    missing = [s.module for s in adapter.sites if len(found.get(f"{s.module}.weight", ())) != 2]
    if missing or not found:
        raise MatchError(
            f"{adapter.path}: its projections are drawn for the widest module, and the base has no "
            f"{(missing or ['such module'])[0]}. Name a base that has all of its modules."
        )
    turned = bool(adapter.settings.get("fan_in_fan_out"))
    sizes = [shape[::-1] if turned else shape for shape in found.values()]
    widest = tuple(max(side) for side in zip(*sizes, strict=True))
    return _with(adapter, lambda _: {"widest": widest})


def _weights(adapter: Adapter, base: BaseFacts) -> Adapter:
    def weight(module: str) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            import numpy as np
            import torch

            return torch.from_numpy(np.array(base.read(f"{module}.weight"), np.float32))

        return load

    return _with(
        adapter, lambda site: {"weight": weight(site.module)} if site.parameter == "bias" else {}
    )


def _order(adapter: Adapter, base: BaseFacts) -> dict[str, tuple[int, int]]:
    settings = adapter.settings
    found: dict[str, tuple[int, int]] = _drawn().layers(
        base.config, lambda path: _peft_lora_config.targeted(settings, path)
    )
    return found


def _drawn() -> Any:
    """What is drawn for a whole model, which is arithmetic, and the bridge's."""
    return plugins.load("adapters", "peft_bridge").drawn


def _tinylora(adapter: Adapter, base: BaseFacts) -> Adapter:
    """Each module with its own vector, and with the seed that its projection is drawn with."""
    order, settings = list(_order(adapter, base)), adapter.settings
    top = "/base_model.tinylora_v."

    def own(site: Site) -> Site:
        if site.module not in order:
            raise MatchError(
                f"{adapter.path}: {site.module} is adapted, but the base's architecture has no such "
                "module. Name the base that it was trained on."
            )
        group = f"{top}{_drawn().tinylora_group(settings, order, site.module)}"
        names = {n: f"{top}0" if n == group else n for n in site.factors}
        kept = {n: new for n, new in names.items() if not new.startswith(top) or n == group}
        drawn = int(settings.get("projection_seed", 42)) + order.index(site.module)
        said = {**settings, "projection_seed": drawn, "weight_tying": 0.0}
        return replace(
            site,
            factors={new: site.factors[n] for n, new in kept.items()},
            load=lambda: {new: site.load()[n] for n, new in kept.items()},
            config=replace(site.config, extra={**site.config.extra, "settings": said}),
        )

    return replace(adapter, sites=tuple(map(own, adapter.sites)))


def _unilora(
    source: Checkpoint, shared: Mapping[str, TensorInfo]
) -> Callable[[Adapter, BaseFacts], Adapter]:
    """Sites for all modules that the config names, with what is drawn for each."""

    def complete(adapter: Adapter, base: BaseFacts) -> Adapter:
        sizes = _order(adapter, base)
        drawn = _drawn().unilora(adapter.settings, sizes)
        settings = {**adapter.settings, "save_indices": True}
        return replace(
            adapter, complete=None, settings=settings,
            sites=tuple(_drawn_site(settings, path, size, drawn) for path, size in sizes.items()),
        )  # fmt: skip

    def _drawn_site(
        settings: Mapping[str, Any], module: str, size: tuple[int, int], drawn: Callable[[], Any]
    ) -> Site:
        (out, in_), rank = size, int(settings["r"])
        shapes = {"A": (rank, in_), "B": (out, rank)}
        facts = {
            name: TensorInfo(f"{PREFIX}{module}.{name}", dtype, shapes[letter])
            for letter in "AB"
            for name, dtype in (
                (f"unilora_indices_{letter}", "I64"), (f"unilora_scales_{letter}", "F32")
            )
        }  # fmt: skip

        def load() -> dict[str, Array]:
            import numpy as np

            whole = {n: source.read(info.name).astype(np.float32) for n, info in shared.items()}
            return {**drawn()[module], **whole}

        said = AdapterConfig("peft_bridge", 1, 1.0, extra={"settings": settings, "module": module})
        turned = bool(settings.get("fan_in_fan_out"))
        return Site(
            module, "weight", "linear", said, {**facts, **shared}, load, fan_in_fan_out=turned
        )

    return complete
