"""torch's AdamW, bit for bit, with its two moments in pages of which so many bytes are in memory at once.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3, paged optimizers, without managed memory. A step goes over the
pages from the first to the last, the next one from the last to the first: what was used last is there still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lorasurgery.training.paging.layout import Segment, layout
from lorasurgery.training.paging.pager import Moved, Pager
from lorasurgery.training.paging.tiers import Tier, below

_MOMENTS = ("exp_avg", "exp_avg_sq")


class PagedAdamW(Optimizer):
    """Elementwise, so that a page is as good as the whole; the state's form on disk is that of torch's AdamW."""

    def __init__(
        self,
        params: Any,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        budget: int | None = None,
        tier: Callable[[torch.device, int], Tier] = below,
    ) -> None:
        """`budget`: bytes of state in memory, None for all. Raises UsageError for one that holds no page."""
        defaults = {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 1e-2}
        super().__init__(params, defaults)
        self._members = [(p, group) for group in self.param_groups for p in group["params"]]
        device = self._members[0][0].device
        self.layout = layout([p.numel() * p.element_size() for p, _ in self._members], budget)
        self._pages = self.layout.segments()
        self._pager = Pager(self.layout, device, lambda: tier(device, self.layout.space))
        self._steps = [0] * len(self._members)
        self._turns = 0
        self._last = Moved()

    @property
    def resident(self) -> int:
        """Bytes of state in memory: fixed, and never more than the budget."""
        return self._pager.resident

    def figures(self) -> dict[str, float]:
        """Of the last step."""
        return {"pages_fetched": self._last.fetched, "pages_written": self._last.written}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        flat = {i: _Flat(p) for i, (p, _) in enumerate(self._members) if p.grad is not None}
        for i in flat:
            self._steps[i] += 1
        wanted = [n for n, held in enumerate(self._pages) if any(s.parameter in flat for s in held)]
        order = wanted if self._turns % 2 == 0 else wanted[::-1]
        self._turns += 1
        for page, following in zip(order, [*order[1:], None], strict=True):
            with self._pager.using(page, following) as held:
                for segment in self._pages[page]:
                    if segment.parameter in flat:
                        self._update(segment, flat[segment.parameter], held)
        for one in flat.values():
            one.settle()
        self._last = self._pager.take_moved()

    def _update(self, segment: Segment, flat: _Flat, held: Tensor) -> None:
        """torch's own function, on a range of elements."""
        i = segment.parameter
        p, group = self._members[i]
        size = p.element_size()
        span = slice(segment.start // size, segment.stop // size)
        at = slice(segment.at, segment.at + segment.stop - segment.start)
        m, v = (half[at].view(p.dtype) for half in held)
        beta1, beta2 = group["betas"]
        adamw(
            [flat.value[span]], [flat.gradient[span]], [m], [v], [],
            [torch.tensor(float(self._steps[i] - 1))], foreach=False, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW gives it; moments are views of the tier below, not copies."""
        kinds = {p.dtype for p, _ in self._members}
        state = {}
        for i, moments in self._moments():
            if self._steps[i]:
                # torch saves no storage that is seen as two dtypes
                own = moments if len(kinds) == 1 else [m.clone() for m in moments]
                step = torch.tensor(float(self._steps[i]))
                state[i] = {"step": step, **dict(zip(_MOMENTS, own, strict=True))}
        paging = {"turns": self._turns, "half": self.layout.half, "order": self._pager.order}
        return {**super().state_dict(), "state": state, "paging": paging}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, with any budget, or torch's AdamW; it is as paged as before."""
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._members = [(p, group) for group in self.param_groups for p in group["params"]]
        order = [i for group in groups for i in group["params"]]
        for i, moments in self._moments():
            found = state_dict["state"].get(order[i])
            self._steps[i] = int(found["step"]) if found else 0
            for moment, name in zip(moments, _MOMENTS, strict=True):
                if found:
                    moment.copy_(found[name])
                else:
                    moment.zero_()
        self._pager.forget()
        paging = state_dict.get("paging", {})
        self._turns = int(paging.get("turns", 0))
        if paging.get("half") == self.layout.half:
            self._pager.warm(paging["order"])

    def _moments(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Both moments of each parameter, of its shape."""
        whole = self._pager.flushed()
        places = zip(self.layout.places, self.layout.sizes, self._members, strict=True)
        for i, (place, size, (p, _)) in enumerate(places):
            yield i, [half[place : place + size].view(p.dtype).view(p.shape) for half in whole]


class _Flat:
    """A parameter and its gradient as one row of elements, copied where they do not lie so."""

    def __init__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._parameter = parameter
        self.value = parameter.detach().reshape(-1)
        self.gradient = parameter.grad.reshape(-1)

    def settle(self) -> None:
        if not self._parameter.is_contiguous():
            self._parameter.copy_(self.value.view(self._parameter.shape))
