"""Cross-entropy of a batch, summed over the positions that have a label."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lorasurgery.errors import UsageError
from lorasurgery.training.batches import Batch
from lorasurgery.training.cross_entropy import summed
from lorasurgery.training.examples import IGNORED


def total(model: nn.Module, batch: Batch) -> Tensor:
    """Float32, in nats; logits are made only where some row has a label."""
    if batch.labels.ndim == 1:
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
        return summed(logits, batch.labels)
    asked: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
    known = accepted(model)
    if batch.positions is not None:
        if "position_ids" not in known:
            raise UsageError(
                f"--pack: {type(model).__name__} takes no positions, so that texts in one row would see "
                "each other. Take it away."
            )
        asked["position_ids"] = batch.positions
    labels = batch.labels
    if "logits_to_keep" in known:
        (wanted,) = (labels != IGNORED).any(0).nonzero(as_tuple=True)
        asked["logits_to_keep"], labels = wanted, labels[:, wanted]
    logits = model(**asked).logits
    return summed(logits.flatten(0, 1), labels.flatten())


def accepted(model: nn.Module) -> set[str]:
    """The names of what its forward takes."""
    return set(inspect.signature(model.forward).parameters)
