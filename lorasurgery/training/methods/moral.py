"""MoRAL: in each layer of the feed-forward blocks, experts that are LoRAs, of which a router chooses for each token.

Yang et al. 2024, arXiv 2402.11260, §3, which leaves much open: here a router belongs to a block and sees its input (or
to each layer), gates are the softmax over the k largest, --balance is Switch's (Fedus et al. 2021, arXiv 2101.03961,
§2.2) and --z-loss ST-MoE's (Zoph et al. 2022, arXiv 2202.08906, eq. 5); of both the router alone has gradients. What
the gates were on average in the last steps is written too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Factors, Hooks, Place, Wanted
from lorasurgery.training.methods.lora import RATE, config_of, groups

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

VARIANT = "moral"
TRAINED = ("A", "B", "router")
# what transformers calls the layers of feed-forward blocks
TARGETS = (
    "gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2", "mlp.c_fc", "mlp.c_proj",
    "dense_h_to_4h", "dense_4h_to_h", "fc_in", "fc_out", "w1", "w2", "w3",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What MoRAL alone has."""

    experts: int = field(default=8, metadata={"help": "N, in each layer."})
    top_k: int = field(
        default=2,
        metadata={"help": "k, that a token has of them.", "flags": ("--top-k", "--topk")},
    )
    balance: float = field(
        default=0.0,
        metadata={"help": "Weight of the term that wants experts used alike; Switch has 0.01."},
    )
    z_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of the term that keeps routers' logits small; ST-MoE has 0.001."},
    )
    router: Literal["block", "linear"] = field(
        default="block",
        metadata={"help": "One for the layers of a feed-forward block, or one for each layer."},
    )
    report_routing: bool = field(
        default=False, metadata={"help": "Say how often each expert was chosen."}
    )


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Raises UsageError for a choice of more experts than there are."""
    if options.experts < 1:
        raise UsageError(f"--experts {options.experts}: is no number of experts. Pass 1 or more.")
    if not 1 <= options.top_k <= options.experts:
        raise UsageError(
            f"--top-k {options.top_k}: of {options.experts} experts cannot be chosen. Pass 1 to "
            f"{options.experts}."
        )
    for flag, weight in (("--balance", options.balance), ("--z-loss", options.z_loss)):
        if not 0 <= weight < float("inf"):
            raise UsageError(f"{flag} {weight:g}: is no weight. Pass 0 for none.")
    extra = {"experts": options.experts, "top_k": options.top_k}
    return replace(config_of(VARIANT, wanted), extra=extra)


def start(
    places: Sequence[Place], config: AdapterConfig, options: Any, seed: int
) -> Mapping[str, Factors]:
    """Experts of their own for each layer."""
    from lorasurgery.training.blocks import one_router_each
    from lorasurgery.training.start import each

    made = each(places, config, seed)
    return one_router_each(made) if options.router == "block" else made


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """What is counted of the routers, and the balance."""
    from lorasurgery.training.routing import Routing

    return Routing(layers, options)
