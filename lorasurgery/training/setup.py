"""From options to a Trainer: model, data, places, factors, groups, optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorasurgery.errors import UsageError
from lorasurgery.operations._language_model import LanguageModel, load
from lorasurgery.training import attach, examples
from lorasurgery.training import method as methods
from lorasurgery.training import optimizer as optimizers
from lorasurgery.training.attach import Detours
from lorasurgery.training.chance import apart
from lorasurgery.training.examples import Example
from lorasurgery.training.method import Group, Method, Rates
from lorasurgery.training.nf4 import asked
from lorasurgery.training.nf4.linear import NF4Linear
from lorasurgery.training.options import Pace, TrainOptions
from lorasurgery.training.ranks import ALONE, Ranks
from lorasurgery.training.recipe import Recipe
from lorasurgery.training.trainer import Parts, Trainer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its first step."""

    trainer: Trainer
    groups: tuple[Group, ...]
    held_out: Sequence[Example]
    settings: dict[str, Any]  # of the adapter's config file


def prepare(base: Path, options: TrainOptions, ranks: Ranks = ALONE) -> Prepared:
    """Raises what each part does of an input that cannot be used."""
    options.check()
    method = cast(Method, methods.load(options.method))
    own = method.Options() if options.own is None else options.own
    method.configure(options.wanted, own)  # before a model is loaded for nothing
    torch.manual_seed(options.wanted.seed)  # a head that the base lacks is drawn
    classes = options.reading.classes
    language = _language(base, options)
    model = language.model.to(device(options.machine.device))
    if classes:
        model.config.pad_token_id = _padding(language)  # what comes last in a row is told by it
    data = _read(options.data, language, options)
    held_out = _read(options.held.data, language, options) if options.held.data else []
    recipe = recipe_of(options, len(data))
    ranks.check_share(recipe.batch * recipe.accumulate)
    wanted = replace(options.wanted, steps=recipe.steps, seed=recipe.seed)
    config = method.configure(wanted, own)
    torch.manual_seed(recipe.seed)
    found = attach.places(model, _targets(method, options))
    factors = method.start(found, config, own, recipe.seed)
    layers = attach.attach(model, found, config, factors, wanted.dropout)
    detours = attach.detours(model, layers, method.TRAINED, _whole(model, options))
    _ready(model, recipe)
    rate = method.RATE if options.pace.rate is None else options.pace.rate
    groups = tuple(method.groups(detours.named(), Rates(rate, options.pace.decay), own))
    optimizer = optimizers.make(options.pace.optimizer, groups, options.pace.settings)
    hooks = method.hooks(layers, wanted, own)
    hooks.ranks = ranks
    if ranks.count > 1:
        from lorasurgery.training.sharded import shard  # what it imports takes a second

        shard(detours)
        apart(ranks)
    parts = Parts(detours, hooks, optimizer, data, _padding(language), ranks)
    said = {
        "task_type": "SEQ_CLS" if classes else "CAUSAL_LM",
        "lora_dropout": wanted.dropout,
        "vera_dropout": wanted.dropout,
    }
    return Prepared(Trainer(parts, recipe), groups, held_out, {**said, **config.extra})


def _language(base: Path, options: TrainOptions) -> LanguageModel:
    """The model, its linear weights in NF4 where that is asked for."""
    nf4 = options.machine.nf4
    if nf4:
        asked.check_method(options.method)
    asked.check_base(base, nf4)
    found = load(base, options.machine.dtype, classes=options.reading.classes, nf4=nf4)
    asked.check_whole(found.model, options.targets.whole)
    return found


def _whole(model: nn.Module, options: TrainOptions) -> tuple[str, ...]:
    """What is trained without factors: of a classifier its head, if nothing else is named."""
    if options.targets.whole or not options.reading.classes:
        return options.targets.whole
    return tuple(name for name, _ in model.named_children() if name in attach.HEADS)


def device(name: str) -> torch.device:
    """`auto` takes a GPU that is there; of several processes, each has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name}: {str(error).splitlines()[0]} Name cpu or cuda."
        ) from None


def _targets(method: Method, options: TrainOptions) -> attach.Targets:
    """Those that were asked for, or else the method's own, or else all."""
    own = () if options.targets.modules else getattr(method, "TARGETS", ())
    return replace(options.targets, modules=own) if own else options.targets


def _read(data: Sequence[str], language: LanguageModel, options: TrainOptions) -> list[Example]:
    vocabulary = language.model.get_input_embeddings().weight.shape[0]
    return examples.load(data, language.tokenizer, vocabulary, options.reading)


def recipe_of(options: TrainOptions, count: int) -> Recipe:
    """The pace in steps, of so many examples."""
    pace, held, machine = options.pace, options.held, options.machine
    a_step = pace.batch * pace.accumulate
    steps = math.ceil(pace.epochs * count / a_step) if pace.steps is None else pace.steps
    return Recipe(
        steps, pace.batch, pace.accumulate, _warmup(pace, steps), pace.schedule, pace.clip,
        options.wanted.seed, machine.autocast, machine.checkpointing, held.evaluate_every,
        held.patience, held.save_every,
    )  # fmt: skip


def _warmup(pace: Pace, steps: int) -> int:
    return math.ceil(pace.warmup * steps) if pace.warmup < 1 else int(pace.warmup)


def _padding(language: LanguageModel) -> int:
    """Any token will do: nothing is predicted from it or of it."""
    found = language.tokenizer.pad_token_id
    return 0 if found is None else int(found)


def _ready(model: nn.Module, recipe: Recipe) -> None:
    """Training mode, and activations computed again instead of kept, if that was asked for."""
    model.train()
    if not recipe.checkpointing:
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"--checkpointing: {type(model).__name__} has no layers that can be computed again. "
            "Take it away."
        )
    live: Any = model
    # its name from transformers 5.20 on, and the one before
    enable = (
        getattr(live, "activation_checkpointing_enable", None) or live.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def describe(detours: Detours, groups: Sequence[Group]) -> dict[str, float]:
    """Counts, of tensors once each."""
    trained = sum(named.parameter.numel() for named in detours.named())
    every = {id(p): p.numel() for p in detours.model.parameters()}
    ours = {id(f) for layer in detours.layers.values() for f in layer.factors.values()}
    packed = [layer for layer in detours.model.modules() if isinstance(layer, NF4Linear)]
    ours |= {id(part) for layer in packed for part in layer.parts}
    base = sum(count for key, count in every.items() if key not in ours)
    base += sum(layer.in_features * layer.out_features for layer in packed)
    told: dict[str, float] = {"modules": len(detours.layers), "trained_parameters": trained, "base_parameters": base,
            "groups": len(groups)}  # fmt: skip
    return told | ({"packed_bytes": sum(la.packed_bytes for la in packed)} if packed else {})
