"""LoRA-FA: A stays at its random start and B alone is trained, so that no x is kept for A's gradient.

Zhang et al. 2023, arXiv 2308.03303, §3. With --fa-projection B's gradient becomes (1/s²) g (A Aᵀ)⁻¹, the step
in B that moves W most like a step along W's own gradient (as PEFT's create_lorafa_optimizer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Hooks, Wanted
from lorasurgery.training.methods.lora import VARIANT, config_of, groups, start

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.training.adapted import Adapted

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

TRAINED = ("B", "m")
RATE = 3e-3


@dataclass(frozen=True, slots=True)
class Options:
    """What LoRA-FA alone has."""

    fa_projection: bool = field(
        default=False, metadata={"help": "Project B's gradient onto what A can reach."}
    )
    dora: bool = field(default=False, metadata={"help": "DoRA's magnitudes as well."})


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Raises UsageError for dropout: its mask is as large as the x that need not be kept."""
    if wanted.dropout:
        raise UsageError(
            f"--dropout {wanted.dropout:g}: keeps a mask of x's size for each module, which is all that "
            "lora-fa saves. Take it away, or train with --method lora."
        )
    if options.dora and options.fa_projection:
        raise UsageError(
            "--fa-projection: is derived for W + s B A, and --dora scales its rows. Take one of them away."
        )
    return config_of("dora" if options.dora else VARIANT, wanted)


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """The projection, if it was asked for."""
    return Projection(layers) if options.fa_projection else Hooks(layers)


class Projection(Hooks):
    """Changes B's gradient before the optimizer sees it; (A Aᵀ)⁻¹ [r, r] never changes."""

    def before(self, step: int) -> None:
        """G becomes g (A Aᵀ)⁻¹ / s²."""
        for layer in self.layers.values():
            g, a = layer.factors["B"].grad, layer.factors["A"]
            if g is not None:
                g.copy_(projected(g, a.detach(), layer.config.scaling))


def projected(g: Tensor, a: Tensor, scaling: float) -> Tensor:
    """G [out, r] (A Aᵀ)⁻¹ / s², of A [r, in]."""
    import torch

    solved: Tensor = torch.linalg.solve(a @ a.T, g.T)
    return solved.T / scaling**2
