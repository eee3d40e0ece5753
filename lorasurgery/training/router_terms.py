"""What a router's softmax p alone is judged by: N Σ fᵢ Pᵢ, and the mean of ln² Σ exp of its logits.

Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4-6; Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5. How often
experts were chosen, f, is known after the last token: what P's gradient is then made of is summed up on the way, and
no x is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RouterTerms:
    """Sums over the tokens of one step that this process has seen."""

    def __init__(self, router: Tensor) -> None:
        self._router = router
        n, in_ = router.shape
        self._likely = router.new_zeros(n)  # Σ p
        self._likely_grad = router.new_zeros(n, n, in_)  # of each Σ pᵢ by the router
        self._square = router.new_zeros(())  # Σ ln² Σ exp
        self._square_grad = router.new_zeros(n, in_)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """More tokens: x [tokens, in]."""
        with torch.autocast(x.device.type, enabled=False):
            self._add(x)

    def _add(self, x: Tensor) -> None:
        logits = x @ self._router.T
        p, log = logits.softmax(-1), logits.logsumexp(-1)
        self._likely += p.sum(0)
        # ∂pᵢ / ∂logitⱼ = pᵢ (δᵢⱼ - pⱼ)
        self._likely_grad -= torch.einsum("ti,tj,td->ijd", p, p, x)
        self._likely_grad += torch.diag_embed((p.T @ x).T).permute(1, 2, 0)
        self._square += log.square().sum()
        self._square_grad += 2 * (log[:, None] * p).T @ x

    def balance(self, chosen: Tensor, tokens: Tensor) -> Tensor:
        """N Σ fᵢ Pᵢ, of choices [N] and tokens of all processes: this one's part."""
        f = (chosen / chosen.sum()).to(self._likely)
        weight = len(f) / tokens[0].to(self._likely)
        grad = torch.einsum("i,ijd->jd", f, self._likely_grad)
        return self._with(weight * (f * self._likely).sum(), weight * grad)

    def z_loss(self, tokens: Tensor) -> Tensor:
        """The mean of ln² Σ exp."""
        count = tokens[0].to(self._square)
        return self._with(self._square / count, self._square_grad / count)

    def _with(self, value: Tensor, grad: Tensor) -> Tensor:
        """The value, with this gradient by the router."""
        return value + ((self._router - self._router.detach()) * grad).sum()
