"""A module of a live model with any variant's factors beside it: y = base(x) + what the variant adds.

Places and dtypes are PEFT's: dropout acts on what the detour sees, factors are float32 whatever the base
is, and the sum is rounded to the base's dtype once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Variant
from lorasurgery.errors import MatchError

# torch's parameters can have no dots in their names
_DOT = "·"


class Adapted(nn.Module):
    """What a linear layer and an embedding have in common: the frozen base, factors, how they are meant.

    A base of another kind (NF4) needs `forward`, and `dense()`, its weight [out, in], for variants that
    read W; `in_features`, `out_features` and `bias` as nn.Linear has them. It may have `with_product(x, a, b, s)`,
    its own output and s (x Aᵀ) Bᵀ at once, rounded to x's dtype.
    """

    layout = "linear"

    def __init__(
        self, base: nn.Module, config: AdapterConfig, factors: Mapping[str, Tensor], dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.variant = cast(Variant, plugins.load("adapters", config.variant))
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.factors = nn.ParameterDict()
        for name, factor in factors.items():
            # a parameter that several layers share stays one
            shared = isinstance(factor, nn.Parameter)
            self.factors[name.replace(".", _DOT)] = (
                factor if shared else nn.Parameter(factor, requires_grad=False)
            )

    @property
    def given(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name.replace(_DOT, "."): factor for name, factor in self.factors.items()}

    @property
    def weight(self) -> Any:
        """The base's own: some models ask a layer for its weight's dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base, "bias", None)

    def dense(self) -> Tensor:
        """W [out, in], float32 or wider."""
        return dense(self.base)


class AdaptedLinear(Adapted):
    """nn.Linear, transformers' Conv1D, or a quantized layer."""

    @property
    def in_features(self) -> int:
        return self.factors_of_w()[1]

    @property
    def out_features(self) -> int:
        return self.factors_of_w()[0]

    def factors_of_w(self) -> tuple[int, int]:
        """W's out and in."""
        return sides(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the base's dtype."""
        detour = getattr(self.variant, "detour", None)
        seen, factors = self._cast(x), self.given
        if detour is None:
            y = self.variant.forward(self.drop(seen), self.dense(), factors, self.config)
            out = y if self.bias is None else y + self.bias
            return out.to(x.dtype)
        dropped = self.drop(seen)
        product = getattr(self.variant, "product", None)
        whole = getattr(self.base, "with_product", None)
        if product and whole and dropped is x:
            in_one: Tensor = whole(x, *product(factors, self.config))
            return in_one
        y = self.base(x)
        beside = _Beside(self, y if dropped is seen else None)
        total: Tensor = y + detour(dropped, factors, self.config, beside)
        return total.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """X Wᵀ of an x that the base may not have seen."""
        y: Tensor = self.base(x.to(self._dtype()))
        return without(y, self.bias)

    def _dtype(self) -> torch.dtype:
        weight = getattr(self.base, "weight", None)
        floats = isinstance(weight, Tensor) and weight.is_floating_point()
        return cast(Tensor, weight).dtype if floats else torch.get_default_dtype()

    def _cast(self, x: Tensor) -> Tensor:
        """To the factors' dtype, unless autocast chooses for each product."""
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(next(f.dtype for f in self.factors.values() if f.is_floating_point()))


def without(y: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer gave, less its bias."""
    return y if bias is None else y - bias


class _Beside:
    """The base as a detour sees it: what it has computed of the same x is not computed again."""

    def __init__(self, layer: AdaptedLinear, y: Tensor | None) -> None:
        self._layer, self._y = layer, y

    def product(self, x: Tensor) -> Tensor:
        if self._y is None:
            return self._layer.product(x)
        return without(self._y, self._layer.bias)

    def weight(self) -> Tensor:
        return self._layer.dense()


class AdaptedEmbedding(Adapted):
    """nn.Embedding: W is [tokens, dim], and a token's row of it is looked up."""

    layout = "embedding"

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int [...] -> [..., dim]."""
        y: Tensor = self.base(tokens)
        factors, names = self.given, getattr(self.variant, "ROWS", ())
        rows = self.num_embeddings
        if names and all(len(factors[name]) == rows for name in names):
            flat = tokens.reshape(-1)
            of = {n: functional.embedding(flat, f) if n in names else f for n, f in factors.items()}
            seen = y.detach().reshape(len(flat), -1).to(next(iter(of.values())).dtype)
            delta = self.variant.delta(seen, of, self.config)
            return (y + delta.reshape(y.shape)).to(y.dtype)
        changed = self.variant.delta(self.dense(), factors, self.config)
        return (y + functional.embedding(tokens, changed)).to(y.dtype)

    @property
    def num_embeddings(self) -> int:
        return sides(self.base)[0]

    @property
    def embedding_dim(self) -> int:
        return sides(self.base)[1]


def dense(module: nn.Module) -> Tensor:
    """A frozen module's W as [out, in], or [tokens, dim], float32 or wider."""
    w = cast(Any, module).dense() if unpacks(module) else cast(Tensor, module.weight).detach()
    if hasattr(w, "full_tensor"):  # a piece of it: every process asks for the whole at once
        w = w.full_tensor()
    w = w.T if turned(module) else w
    return cast(Tensor, w.to(torch.promote_types(w.dtype, torch.float32)))


def unpacks(module: nn.Module) -> bool:
    """Whether its weight is not there as such, but `dense` gives it; BERT has modules of that name."""
    return inspect.ismethod(getattr(module, "dense", None))


def turned(module: nn.Module) -> bool:
    """Whether it keeps W as [in, out]: transformers' Conv1D does."""
    return type(module).__name__ == "Conv1D"


def sides(module: nn.Module) -> tuple[int, int]:
    """W's out and in, of a quantized module too."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if turned(module):
        in_, out = cast(Tensor, module.weight).shape
        return out, in_
    return int(cast(int, module.out_features)), int(cast(int, module.in_features))


def wrap(
    base: nn.Module, config: AdapterConfig, factors: Mapping[str, Tensor], dropout: float = 0.0
) -> Adapted:
    """The form that fits the module. Raises MatchError where there is none."""
    if isinstance(base, nn.Embedding):
        return AdaptedEmbedding(base, config, factors, 0.0)
    if turned(base) or hasattr(base, "in_features"):
        return AdaptedLinear(base, config, factors, dropout)
    raise MatchError(
        f"{type(base).__name__}: no linear layer and no embedding, so that {config.variant} cannot stand "
        "beside it. Leave it out with --exclude-modules."
    )
