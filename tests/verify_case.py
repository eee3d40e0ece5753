"""A base, an adapter in PEFT's layout, and merges of them made with torch alone."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorasurgery.codec import CodecOptions
from lorasurgery.operations.quantize import QuantizeOptions, quantize
from lorasurgery.operations.verify import VerifyOptions, verify
from lorasurgery.surgery import RunOptions

Q, OUT_PROJ, UP, EXPERTS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.experts",
)
# out x in; q is square, so that it can be turned without anyone noticing


SHAPES = {Q: (96, 96), OUT_PROJ: (96, 80), UP: (160, 96)}


RANK, ALPHA = 8, 20.0


SCALE = ALPHA / RANK


OTHERS = {"model.embed_tokens.weight": (50, 96), "model.norm.weight": (96,)}


@dataclass
class Case:
    """A base, an adapter in PEFT's layout, and what a merge of them must hold, all float64."""

    tmp: Path
    dtype: torch.dtype = torch.bfloat16
    config: dict = field(default_factory=dict)
    size: float = 0.02  # of the change, relative to W
    scale: float = SCALE
    seed: int = 0

    def __post_init__(self):
        self.rng = torch.Generator().manual_seed(self.seed)
        names = {f"{m}.weight": s for m, s in SHAPES.items()} | OTHERS
        self.base = {n: (0.05 * self.randn(*s)).to(self.dtype) for n, s in names.items()}
        self.factors = {m: self.pair(*s) for m, s in SHAPES.items()}
        self.save("base", self.base)
        self.write_adapter("adapter", self.factors)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.rng)

    def pair(self, out, in_):
        """B A has an element's root mean square of 0.05 size / scale."""
        return self.randn(RANK, in_), 0.05 * self.size / self.scale / math.sqrt(RANK) * self.randn(
            out, RANK
        )

    def delta(self, module, scale=None):
        a, b = self.factors[module]
        return (self.scale if scale is None else scale) * (b.double() @ a.double())

    def merged(self, scale=None, **changed):
        """W + D, rounded once; `changed` are other tensors by the name of a module."""
        out = dict(self.base)
        for module in SHAPES:
            delta = changed.get(module, self.delta(module, scale))
            w = self.base[f"{module}.weight"]
            out[f"{module}.weight"] = (w.double() + delta).to(w.dtype)
        return out

    def save(self, name, tensors, **config):
        folder = self.tmp / name
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def write_adapter(self, name, factors, extra=None, **config):
        folder = self.tmp / name
        folder.mkdir()
        modules = sorted(m.rpartition(".")[2] for m in factors)
        plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
        config = {**plain, **self.config, **config}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        keys = {}
        for module, (a, b) in factors.items():
            keys[f"base_model.model.{module}.lora_A.weight"] = a
            keys[f"base_model.model.{module}.lora_B.weight"] = b
        keys |= {f"base_model.model.{n}": t for n, t in (extra or {}).items()}
        save_file(
            {k: v.contiguous() for k, v in keys.items()}, folder / "adapter_model.safetensors"
        )
        return folder

    def verify(self, tensors, adapters=("adapter",), **options):
        folder = self.save("merged", tensors)
        texts = [str(self.tmp / a) for a in adapters]
        return verify(folder, self.tmp / "base", texts, VerifyOptions(**options))


def by_name(found):
    return {f.tensor: f for f in found.findings}


def causes(found):
    return {f.tensor: f.cause for f in found.wrong}


def all_modules(cause):
    return {f"{m}.weight": cause for m in SHAPES}


def decode(stored, name):
    """NF4 by its formula: map[code] times the scale of its 64, itself map[code] times scale plus offset."""
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    scale = stored[f"{name}.nested_quant_map"][stored[f"{name}.absmax"].long()]
    scale = scale * stored[f"{name}.nested_absmax"].repeat_interleave(256)[: len(scale)]
    q = stored[name].flatten()
    codes = torch.stack((q >> 4, q & 15), 1).flatten().long()
    w = stored[f"{name}.quant_map"][codes] * (scale + state["nested_offset"]).repeat_interleave(64)
    return w.view(state["shape"]).bfloat16()


def nf4(path, out):
    quantize(path, out, QuantizeOptions(CodecOptions(64, double=True)), RunOptions())
