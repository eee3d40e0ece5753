"""Steps of LoRA or QLoRA on one batch, in a fresh process: ours, or PEFT's layers in a plain loop. Prints JSON.

Both sides begin with the same factors, in float32, on the same tokens; the first step is not timed. Over NF4
the model is bfloat16 and so are its products, under autocast, as QLoRA is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
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
from lorasurgery.training.paging.adamw import PagedAdamW
from lorasurgery.training.recipe import Recipe
from lorasurgery.training.trainer import Parts, Trainer

RATE, SEED = 1e-3, 0


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
    config = AdapterConfig("lora", options.rank, 2.0 * options.rank)
    layers = attach.attach(model, found, config, start.each(found, config, SEED))
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


def ours(options: argparse.Namespace) -> Trainer:
    """With torch's AdamW."""
    return trainer(load(options.base, packed=options.packed), options, Settings())


def peer(options: argparse.Namespace) -> Callable[[], float]:
    """A step of PEFT's model, over bitsandbytes' layers if they are packed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if options.packed else torch.float32
    plain: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype)
    for module in plain.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    rank = options.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
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


def paged(options: argparse.Namespace) -> Trainer:
    """With moments in pages, so many MiB of them in memory."""
    whole = ours(options)
    budget = None if math.isinf(options.budget) else int(options.budget * 2**20)
    groups = lora.groups(whole.parts.detours.named(), Rates(RATE), None)
    optimizer = make("paged-adamw", groups, Settings(budget=budget))
    return Trainer(replace(whole.parts, optimizer=optimizer), whole.recipe)


def told(made: Trainer) -> dict[str, Any]:
    """After the last step: what the factors are, and what paging did."""
    digest, optimizer = hashlib.sha256(), made.parts.optimizer
    trained = [named.parameter for named in made.parts.detours.named()]
    for parameter in trained:
        digest.update(parameter.detach().numpy().tobytes())
    found: dict[str, Any] = {"digest": digest.hexdigest()}
    if isinstance(optimizer, PagedAdamW):
        state = 8 * sum(parameter.numel() for parameter in trained)
        more = {"resident": optimizer.resident, "page": 2 * optimizer.layout.half, "state": state}
        found |= {**optimizer.figures(), **more}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "peer", "paged"))
    parser.add_argument("base", type=Path)
    parser.add_argument("--packed", action="store_true", help="the base is NF4")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="MiB of paged state in memory"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    made = {"ours": ours, "paged": paged}[options.side](options) if options.side != "peer" else None
    step = peer(options) if made is None else (lambda: made.step()["loss"])
    times, losses = [], []
    for _ in range(options.steps):
        began = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": times[1:], "losses": losses, **(told(made) if made else {})}))


if __name__ == "__main__":
    main()
