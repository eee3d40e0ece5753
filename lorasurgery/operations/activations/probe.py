"""A hook on one live module: it adds the adapter's change to the output, and sums up what the inputs were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moment:
    """What the inputs x of one module were; `turned`: its outputs are Δᵀ x, as an embedding's are.

    second: float64 E[u uᵀ], [k, k] of u = A x; where there are no factors [in, in] of x, or its diagonal [in].
    """

    square: float  # E||x||²
    second: Array
    columns: int  # of x
    turned: bool

    @property
    def mean(self) -> float:
        """The square of one element of x, on average."""
        return self.square / self.columns


class Probe:
    """Counts while `counting`; sums are float64, of products of one window in float32 or float64.

    a: float32 [k, in] and b [out, k] of the change b a of the module's outputs; or None and the whole change [out, in].
    """

    def __init__(self, name: str, module: Any, a: Array | None, b: Array, *, turned: bool) -> None:
        import torch

        self.name, self.module, self.turned = name, module, turned
        self._a = None if a is None else torch.from_numpy(np.ascontiguousarray(a, np.float32))
        self._b = torch.from_numpy(np.ascontiguousarray(b, np.float32))
        self._picks = isinstance(module, torch.nn.Embedding)
        self.counting = False
        self.tokens = 0
        self._columns = int((self._b if self._a is None else self._a).shape[1])
        self._square = 0.0
        self._second: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of its sums, where they are large."""
        return 8 * self._columns**2 if self._a is None and not self._picks else 0

    def hook(
        self, _module: Any, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        """The output that the adapted module would have."""
        given = args[0] if args else next(iter(kwargs.values()))
        change = self._look_up(given) if self._picks else self.change(given)
        return output + change.reshape(output.shape).to(output.dtype)

    def moment(self) -> Moment:
        assert self._second is not None, self.name
        second = (self._second / self.tokens).numpy()
        return Moment(self._square / self.tokens, second, self._columns, self.turned)

    def change(self, x: Tensor) -> Tensor:
        """What is added to a linear layer's outputs: x [..., in] -> [tokens, out]."""
        x = x.reshape(-1, self._columns).float()
        u = x if self._a is None else x @ self._a.T  # [tokens, k]
        if self.counting:
            self._square += float(x.double().square().sum())
            wide = u if self._a is None else u.double()
            self._add(len(x), wide.T @ wide)
        return u @ self._b.T

    def _look_up(self, ids: Tensor) -> Tensor:
        """An embedding's x is 1 at the token, and 0 elsewhere."""
        import torch

        ids = ids.reshape(-1)
        u = None if self._a is None else self._a.T[ids]
        if self.counting:
            self._square += len(ids)
            if u is None:
                self._add(len(ids), torch.bincount(ids, minlength=self._columns))
            else:
                self._add(len(ids), u.double().T @ u.double())
        # Gemma's embeddings are scaled as they are looked up
        scale = getattr(self.module, "embed_scale", 1.0)
        return scale * (self._b.T[ids] if u is None else u @ self._b.T)

    def _add(self, tokens: int, second: Tensor) -> None:
        self.tokens += tokens
        self._second = second.double() if self._second is None else self._second + second
