"""A frozen base in pieces, one for each process (torch's FSDP2): a block's weights are whole while it is computed.

Factors and modules that are trained whole are small, and stay whole in each process.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard

from lorasurgery.training.attach import Detours
from lorasurgery.training.nf4.linear import NF4Linear


def shard(detours: Detours) -> None:
    """Each block by itself, NF4 weights too, and what lies outside of them with the model.

    Buffers stay whole: rotary tables, and a few bytes of each NF4 layer.
    """
    model = detours.model
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            layer.as_parameters()
    kept = {factor for layer in detours.layers.values() for factor in layer.factors.values()}
    kept |= {p for p in model.parameters() if p.requires_grad}
    for block in blocks(model):
        fully_shard(block, ignored_params=kept)
    fully_shard(model, ignored_params=kept)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The layers of the longest list of modules that is there."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max([nn.ModuleList(), *lists], key=len)
