"""Steps of LoRA or QLoRA on one batch, in a fresh process: ours, or PEFT's layers in a plain loop. Prints JSON.

Both sides begin with the same factors, in float32, on the same tokens; the first step is not timed. Over NF4
the model is bfloat16 and so are its products, under autocast, as QLoRA is run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lorasurgery.adapter import AdapterConfig
from lorasurgery.codec import CodecOptions
from lorasurgery.training import attach, start
from lorasurgery.training.attach import Targets
from lorasurgery.training.examples import Example
from lorasurgery.training.method import Hooks, Rates
from lorasurgery.training.methods import lora
from lorasurgery.training.optimizer import Settings, make
from lorasurgery.training.recipe import Recipe
from lorasurgery.training.trainer import Parts, Trainer

RANK, RATE, SEED = 8, 1e-3, 0
CONFIG = AdapterConfig("lora", RANK, 2.0 * RANK)


def load(base: Path, *, packed: bool) -> Any:
    """Our model: packed weights as they are stored."""
    if packed:
        from lorasurgery.training.nf4.load import load as load_nf4

        return load_nf4(base, torch.bfloat16, CodecOptions())
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def tokens(vocabulary: int, batch: int, length: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocabulary, (batch, length), generator=rng)


def trainer(model: Any, options: argparse.Namespace, settings: Settings) -> Trainer:
    """What `train` makes, without its files."""
    found = attach.places(model, Targets())
    layers = attach.attach(model, found, CONFIG, start.each(found, CONFIG, SEED))
    detours = attach.detours(model, layers, lora.TRAINED, ())
    model.train()
    optimizer = make("adamw", lora.groups(detours.named(), Rates(RATE), None), settings)
    drawn = tokens(model.config.vocab_size, options.batch, options.length)
    rows = [tuple(row) for row in drawn.tolist()]
    examples = [Example(str(i), row, row) for i, row in enumerate(rows)]
    recipe = Recipe(
        options.steps, options.batch, schedule="constant", clip=None, autocast=options.packed
    )
    return Trainer(Parts(detours, Hooks(layers), optimizer, examples, 0), recipe)


def ours(options: argparse.Namespace) -> Callable[[], float]:
    """A step of ours; its loss."""
    made = trainer(load(options.base, packed=options.packed), options, Settings())
    return lambda: made.step()["loss"]


def peer(options: argparse.Namespace) -> Callable[[], float]:
    """A step of PEFT's model, over bitsandbytes' layers if they are packed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if options.packed else torch.float32
    plain: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype)
    for module in plain.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model: Any = get_peft_model(plain, config)
    held = dict(model.named_parameters())
    for name, factor in held.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            bound = factor.shape[1] ** -0.5
            with torch.no_grad():
                factor.uniform_(-bound, bound, generator=start.generator(SEED, module))
    trained = [p for p in held.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    rows = tokens(plain.config.vocab_size, options.batch, options.length)
    model.train()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.packed):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def paged(options: argparse.Namespace) -> tuple[Callable[[], float], Trainer]:
    """A step of ours with moments in pages, a budget for all of it, half of it or so many bytes in memory."""
    model = load(options.base, packed=options.packed)
    whole = trainer(model, options, Settings())
    size = 8 * sum(n.parameter.numel() for n in whole.parts.detours.named())
    settings = Settings(budget=int(size * options.share))
    groups = lora.groups(whole.parts.detours.named(), Rates(RATE), None)
    parts = replace(whole.parts, optimizer=make("paged-adamw", groups, settings))
    made = Trainer(parts, whole.recipe)
    return lambda: made.step()["loss"], made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "peer", "paged"))
    parser.add_argument("base", type=Path)
    parser.add_argument("--packed", action="store_true", help="the base is NF4")
    parser.add_argument("--share", type=float, default=1.0, help="of the paged state in memory")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    told: dict[str, Any] = {}
    if options.side == "paged":
        step, made = paged(options)
    else:
        step = (ours if options.side == "ours" else peer)(options)
    times, losses = [], []
    for _ in range(options.steps):
        began = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - began)
    if options.side == "paged":
        told = made.parts.optimizer.figures()  # type: ignore[attr-defined]
    print(json.dumps({"seconds": times[1:], "losses": losses, **told}))


if __name__ == "__main__":
    main()
