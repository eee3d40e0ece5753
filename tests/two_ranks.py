"""What test_training_ranks.py has torchrun start: several runs of `train`, one after another.

torchrun ... -m tests.two_ranks '[[flags], ...]'; a run whose first word is a number is stopped after that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import distributed

from lorasurgery.cli import app
from lorasurgery.training import sharded, trainer
from lorasurgery.training.nf4.linear import NF4Linear

STEP = trainer.Trainer.step


def interrupted(at: int) -> Any:
    """Trainer.step, with a Ctrl-C for the first process in one of them."""

    def step(self: trainer.Trainer) -> dict[str, float]:
        if self.step_done + 1 == at and self.parts.ranks.first:
            os.kill(os.getpid(), signal.SIGINT)
        return STEP(self)

    return step


def held(model: torch.nn.Module) -> list[list[int]]:
    """Bytes of the frozen parameters that lie in this process, and of all; the same of NF4 weights."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    packed = [part for m in model.modules() if isinstance(m, NF4Linear) for part in m.parts]
    return [
        [sum(local(t).nbytes for t in of), sum(t.numel() * t.element_size() for t in of)]
        for of in (frozen, packed)
    ]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(runs: list[list[str]]) -> None:
    """Exit codes on stdout."""
    # a second group would find the first one's addresses with torchrun
    distributed.init_process_group("gloo")
    shard = sharded.shard

    def seen(detours: Any) -> None:
        shard(detours)
        if os.environ["RANK"] == "0":
            print(json.dumps(held(detours.model)))

    sharded.shard = seen
    for number, flags in enumerate(runs):
        stopped = flags[0].isdecimal()
        trainer.Trainer.step = interrupted(int(flags[0])) if stopped else STEP
        sys.argv = ["lorasurgery", "train", *flags[stopped:]]
        try:
            app.main()
        except SystemExit as end:
            if end.code and os.environ["RANK"] == "0":
                print(number, end.code)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
