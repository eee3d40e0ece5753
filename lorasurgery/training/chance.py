"""The generators that dropout draws from, saved and put back, whatever the number of processes then and now."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorasurgery.training.ranks import Ranks


def chances(device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """The first process's as `cpu` and `cuda`, others' as `cpu.1` and so on."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    every = ranks.gather(mine)
    return {_name(k, number): t for number, held in enumerate(every) for k, t in held.items()}


def take_chance(held: Mapping[str, Tensor], device: torch.device, ranks: Ranks) -> None:
    """A process that was not there when they were saved draws what none of the others does."""
    if (mine := held.get(_name("cpu", ranks.number))) is not None:
        torch.set_rng_state(mine)
    else:
        torch.set_rng_state(held["cpu"])
        apart(ranks)
    if (there := held.get(_name("cuda", ranks.number))) is not None:
        torch.cuda.set_rng_state(there, device)


def apart(ranks: Ranks) -> None:
    """From one state for all processes to one of its own for each: rows differ in what is dropped."""
    if ranks.number:
        drawn = torch.randint(1 << 62, (ranks.number + 1,))
        torch.manual_seed(int(drawn[-1]))


def _name(kind: str, number: int) -> str:
    return f"{kind}.{number}" if number else kind
