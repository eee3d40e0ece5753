"""What a forward pass keeps for the backward pass: bytes of activations, of a method and of the base alone.

Each piece of memory counts once, weights and factors not at all: they are there anyway. The base alone is run as if
something trained came before it: what is kept beyond that is kept for the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasurgery.errors import UsageError
from lorasurgery.training.attach import Detours

if TYPE_CHECKING:
    from lorasurgery.training.trainer import Trainer


def report(trainer: Trainer) -> dict[str, float]:
    """On the first step's first batch; where A and B are all that there is, also what training both would keep.

    Raises UsageError for --checkpointing and for several processes.
    """
    if trainer.recipe.checkpointing or trainer.parts.ranks.count > 1:
        flag = "--checkpointing" if trainer.recipe.checkpointing else "torchrun"
        raise UsageError(
            f"--mem-report: counts what one forward pass keeps, and {flag} keeps it elsewhere. Take one of "
            "them away."
        )
    detours, batch = trainer.parts.detours, trainer.batches(1)[0]

    def once() -> int:
        with torch.random.fork_rng():
            return kept(detours.model, lambda: trainer.forward(batch))

    with _bare(detours):
        base = once()
    found = {"saved_bytes": once(), "saved_bytes_of_base": base}
    found["saved_bytes_of_adapter"] = found["saved_bytes"] - base
    if all(set(layer.factors) == {"A", "B"} for layer in detours.layers.values()):
        with _all_trained(detours):
            lora = once()
        found |= {"saved_bytes_as_lora": lora, "saved_bytes_of_lora_adapter": lora - base}
    return {name: float(count) for name, count in found.items()} | _shares(found)


def _shares(found: Mapping[str, int]) -> dict[str, float]:
    """Of what LoRA keeps, where that is something else."""
    lora = found.get("saved_bytes_as_lora", found["saved_bytes"])
    if lora == found["saved_bytes"]:
        return {}
    own = found["saved_bytes_of_adapter"] / found["saved_bytes_of_lora_adapter"]
    return {"saved_share": found["saved_bytes"] / lora, "saved_share_of_adapter": own}


def kept(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd holds of one call, beside the model's own."""
    own = {_place(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            found[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = forward()  # while the graph is, no memory is given away twice
    total = sum(found.values())
    del alive
    return total


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _bare(detours: Detours) -> Iterator[None]:
    """The base in the place of its adapted layers, with gradients through what it gets."""
    model = detours.model
    for path, layer in detours.layers.items():
        _put(model, path, layer.base)
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda _module, _given, out: out.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
        for path, layer in detours.layers.items():
            _put(model, path, layer)


@contextmanager
def _all_trained(detours: Detours) -> Iterator[None]:
    frozen = [
        f for la in detours.layers.values() for f in la.factors.values() if not f.requires_grad
    ]
    for factor in frozen:
        factor.requires_grad_()
    try:
        yield
    finally:
        for factor in frozen:
            factor.requires_grad_(requires_grad=False)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
