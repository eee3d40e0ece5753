"""LoRA-drop's first half: a LoRA everywhere is trained a little on a sample, and modules are kept for what theirs does.

Zhou et al. 2024, arXiv 2402.07721, §3: E||s B A x||² over the sample's tokens, x being what the module gets then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorasurgery.errors import UsageError
from lorasurgery.operations.activations.importance import Scope, group_of, output2, ranked
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.training import setup, written
from lorasurgery.training.adapted import Adapted
from lorasurgery.training.batches import collate
from lorasurgery.training.examples import Example
from lorasurgery.training.kept import Kept, Weighed
from lorasurgery.training.options import TrainOptions
from lorasurgery.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Selecting:
    """`threshold` is the importance that the kept modules have together, of each group or of all."""

    threshold: float = 0.9
    over: Scope = "group"
    sample: float = 0.1  # of the examples

    def check(self) -> None:
        """Raises UsageError for what is no share."""
        for flag, value in (("--threshold", self.threshold), ("--sample", self.sample)):
            if not 0 < value <= 1:
                raise UsageError(f"{flag} {value:g}: is a share. Pass more than 0, and 1 at most.")


@dataclass(frozen=True, slots=True)
class Selected:
    """What was found, on how many examples and tokens, in how many seconds."""

    kept: Kept
    examples: int
    tokens: int
    seconds: float


def select(base: Path, options: TrainOptions, how: Selecting) -> Selected:
    """Raises what `train` does; UsageError where no change does anything yet, for B has not left 0."""
    began = time.perf_counter()
    how.check()
    trainer, sample = _sampled(base, options, how)
    while not trainer.over:
        told = trainer.step()
        options.watch(told, trainer.recipe.steps)
    moments, tokens = _moments(trainer, sample)
    kept = _kept(trainer, moments, options, how)
    return Selected(kept, len(sample), tokens, time.perf_counter() - began)


def _sampled(
    base: Path, options: TrainOptions, how: Selecting
) -> tuple[Trainer, Sequence[Example]]:
    prepared = setup.prepare(base, options)
    parts = prepared.trainer.parts
    sample = sampled(parts.examples, how.sample, options.wanted.seed)
    recipe = setup.recipe_of(options, len(sample))
    if not recipe.steps:
        raise UsageError(
            "--steps 0: B has not left 0 then, and nothing is more important than another. Train for "
            "some steps."
        )
    return Trainer(replace(parts, examples=sample), recipe), sample


def sampled(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """A share of each label's, one at least, in the order that they were in."""
    by_label: dict[int | None, list[int]] = {}
    for i, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(i)
    dice = np.random.Generator(np.random.PCG64([seed, len(examples)]))
    chosen: list[int] = []
    for members in by_label.values():
        count = max(1, round(share * len(members)))
        chosen += dice.permutation(members)[:count].tolist()
    return [examples[i] for i in sorted(chosen)]


def _moments(trainer: Trainer, sample: Sequence[Example]) -> tuple[Mapping[str, Moment], int]:
    """E[u uᵀ], u = A x, of each module; one example at a time, so that there is no padding."""
    model, layers = trainer.parts.model, trainer.parts.detours.layers
    device = next(model.parameters()).device
    counts = {path: _Count(layer) for path, layer in layers.items()}
    model.eval()
    with torch.no_grad(), ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(counts[path]).remove)
        for example in sample:
            batch = collate([example], trainer.parts.padding).to(device)
            model(input_ids=batch.tokens)
    tokens = sum(len(example.tokens) for example in sample)
    return {path: count.moment() for path, count in counts.items()}, tokens


class _Count:
    """Sums over the tokens that one layer gets."""

    def __init__(self, layer: Adapted) -> None:
        self._turned = layer.layout == "embedding"
        self._factors = layer.given
        rank = len(self._factors["A"])
        self._second = np.zeros((rank, rank))
        self._square, self._tokens = 0.0, 0

    def __call__(self, _layer: Adapted, given: tuple[Tensor, ...]) -> None:
        x, a, b = given[0], self._factors["A"], self._factors["B"]
        if self._turned:
            u, square = b[x.reshape(-1)], float(x.numel())
        else:
            flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
            u, square = flat @ a.T, float(flat.double().square().sum())
        wide = u.double()
        self._second += (wide.T @ wide).cpu().numpy()
        self._square, self._tokens = self._square + square, self._tokens + len(u)

    def moment(self) -> Moment:
        """Of a module that saw nothing: nothing."""
        tokens = max(1, self._tokens)
        columns = self._factors["A"].shape[1]
        return Moment(self._square / tokens, self._second / tokens, columns, self._turned)


def _kept(
    trainer: Trainer, moments: Mapping[str, Moment], options: TrainOptions, how: Selecting
) -> Kept:
    detours = trainer.parts.detours
    sites = written.adapter(detours, options.name, Path(options.name), {}).sites
    groups, found = [], []
    for site in sites:
        factors = site.load()
        a, b = factors["A"], np.float32(site.config.scaling) * factors["B"]
        groups.append(group_of(site, a, b))
        found.append(output2(a, b, moments[site.module]))
    total = sum(found)
    if not total:
        raise UsageError(
            f"--steps {trainer.step_done}: none of the {len(found)} changes does anything to an output yet. "
            "Train longer, or at a higher --lr."
        )
    weighed = [
        Weighed(site.module, one.group, one.output2, one.output2 / total, one.share, one.kept)
        for site, one in zip(
            sites, ranked(sites, groups, found, how.threshold, how.over), strict=True
        )
    ]
    said = {
        "base": options.name, "method": "lora-drop", "threshold": how.threshold, "over": how.over,
        "steps": trainer.step_done, "sample": how.sample, "seed": options.wanted.seed,
    }  # fmt: skip
    return Kept(tuple(weighed), said)
