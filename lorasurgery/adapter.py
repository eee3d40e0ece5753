"""An adapter is sites: one adapted parameter each, with its config and a few named factors on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.arrays import A, Array


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields that every variant reads; `extra` holds a variant's own."""

    variant: str
    rank: int
    alpha: float
    rank_stabilized: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). The one place it is computed."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted parameter, as the trainer saw it.

    `module` is the path without the trainer's prefix; `parameter` is 'weight' but for
    target_parameters; `factors` are facts, with the dtype that a dialect writes them in; `load` reads
    them as float32, W-side: A [r, in], B [out, r].
    `layout` says how W is meant: 'linear' [out, in], 'embedding' [tokens, dim], 'parameter' as it is
    stored, 'experts' [experts, out, in] with A [experts, r, in] and B [experts, out, r], 'channels' a
    convolution's [out, in, ...] of which the factors know the channels alone.
    """

    module: str
    parameter: str
    layout: str
    config: AdapterConfig
    factors: Mapping[str, TensorInfo]
    load: Callable[[], Mapping[str, Array]]
    kernel: tuple[
        int, ...
    ] = ()  # of a convolution, whose W [out, in, *kernel] is seen as [out, in]
    fan_in_fan_out: bool = False  # a hint that W is stored [in, out]; PEFT writes its last module's
    # W's out and in, where they are not to be read off factors A and B; None: the factors do not tell
    sides: tuple[int | None, int | None] = (None, None)
    optional: bool = False  # does nothing to a base that has no such parameter

    @property
    def size(self) -> tuple[int | None, int | None]:
        """W's out and in, as far as the factors tell."""
        if self.sides != (None, None) or "A" not in self.factors:
            return self.sides
        return self.factors["B"].shape[-2], self.factors["A"].shape[-1]

    @property
    def experts(self) -> int:
        """How many matrices are stacked in W; 1 for a plain weight."""
        a = self.factors.get("A")
        return a.shape[0] if self.layout == "experts" and a else 1


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a base tells an adapter that is incomplete without it, by module and parameter as it is live."""

    config: Mapping[str, Any]  # its config.json
    shapes: Callable[[Sequence[str]], Mapping[str, tuple[int, ...]]]  # of those that it has
    read: Callable[[str], Array]


@dataclass(frozen=True, slots=True)
class Adapter:
    """All that an adapter directory or file says, whatever its dialect."""

    path: Path
    dialect: str
    base: str | None  # the base model's name as the trainer recorded it
    sites: tuple[Site, ...]
    # whole tensors that replace the base's (modules_to_save, bias), by module path + parameter
    replaced: Mapping[str, TensorInfo]
    # vectors that are added (lora_bias), scaling applied by `load`
    added: Mapping[str, TensorInfo]
    load: Callable[[str], Array]  # one of `replaced`
    load_added: Callable[[str], Array]  # one of `added`: float32, scaled
    settings: Mapping[str, Any] = field(default_factory=dict)  # the config file, as it stands
    problems: tuple[Problem, ...] = ()  # parts that are not understood, and may be left out
    # where factors depend on the base (VeRA's projections): the adapter with all of them; None where
    # nothing is missing
    complete: Callable[[BaseFacts], Adapter] | None = None
    # the base's config.json, where a layout needs its sizes (GGUF's row order) and it was given
    base_config: Mapping[str, Any] = field(default_factory=dict)


class Base(Protocol):
    """The frozen layer beside a detour, dense or quantized."""

    def product(self, x: Tensor) -> Tensor:
        """X Wᵀ, without a bias."""
        ...

    def weight(self) -> Tensor:
        """W [out, in], float32 or wider."""
        ...


class Variant(Protocol):
    """What a module in adapters/ offers. W is [out, in]; all maths in float32.

    A variant that knows what it adds to x Wᵀ without W's being read for it may offer
    `detour(x, factors, config, base)`, so that it can be trained beside a base of any kind; and where that is
    s (x Aᵀ) Bᵀ with nothing else, `product(factors, config)`, A, B and s, for a kernel that takes W with them.
    A variant whose ΔW has rows that depend on the same rows of W alone may say which factors have a
    row for each of W's (ROWS = ("B",)): without a low-rank form it is then merged row by row, and by its
    own kernel if `merged_by` names one. ROUTED says that what it does depends on the token: it has no ΔW. `low_rank_on`
    gives A and B as low_rank does, of a W that has to be known. `from_NAME(w, factors, config)` are the factors, at the
    same rank and alpha, that change W exactly as those of the variant NAME do; None where none do. BOUND says that its factors belong to one base, whose hash a site carries in extra['base'].
    """

    @property
    def LINEAR_IN_W(self) -> bool: ...  # the delta is free of W, so unmerging subtracts it

    def shapes(self, out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]: ...
    def init(self, w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]: ...
    def delta(self, w: A, factors: Mapping[str, A], config: AdapterConfig) -> A: ...
    def forward(
        self, x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig
    ) -> Tensor: ...

    def from_lora(self, w: A, a: A, b: A) -> dict[str, A] | None:
        """Factors of this variant, at rank len(a) and scaling 1, that change W by B A; None if none do."""
        ...

    def from_delta(
        self, w: A, delta: A, lora: tuple[A, A], config: AdapterConfig
    ) -> dict[str, A] | None:
        """The nearest of this variant, with this config at scaling 1, to any ΔW [out, in] of W.

        `lora` is the nearest A and B of a rank; None where `from_lora` of it is as good, or nothing is near.
        """
        ...

    def low_rank(self, factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A] | None:
        """A [k, in] and B [out, k], scaling folded in, with delta = B A; None if there is no such form."""
        ...


class Dialect(Protocol):
    """What a module in dialects/ offers: one on-disk layout of adapters."""

    def detect(self, path: Path) -> bool:
        """Whether this path holds an adapter in this layout, told from names and headers."""
        ...

    def read(self, path: Path) -> Adapter: ...

    @property
    def VARIANTS(self) -> tuple[str, ...]:
        """What this layout can hold; `write` refuses the others."""
        ...

    def write(self, adapter: Adapter, folder: Path) -> None:
        """The adapter's files into an empty directory. Raises FormatError for what they cannot say."""
        ...
