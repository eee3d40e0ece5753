"""AdaLoRA: P diag(E) Q in each module, and one budget of triplets for all of them, which falls to --target-r each.

Zhang et al. 2023, arXiv 2303.10512, §3. As in the authors' code the penalty is the norm and not its square, and
importance is told after the optimizer's step, from the new factors and the gradients that made them. A triplet that
the budget leaves out has E = 0 and may come back, until the last --t-final steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Hooks, Wanted
from lorasurgery.training.methods.lora import RANK, groups, start

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

VARIANT = "adalora"
TRAINED = ("A", "E", "B")
RATE = 2e-3


@dataclass(frozen=True, slots=True)
class Options:
    """What AdaLoRA alone has."""

    init_r: int | None = field(
        default=None, metadata={"help": "Each module's rank at first; 1.5 times --target-r."}
    )
    target_r: int | None = field(
        default=None, metadata={"help": "The mean rank in the end, as --rank."}
    )
    t_init: int | None = field(
        default=None,
        metadata={
            "help": "Steps before the budget falls; a tenth of all.",
            "flags": ("--t-init", "--tinit"),
        },
    )
    t_final: int | None = field(
        default=None,
        metadata={
            "help": "Steps with the ranks as they are in the end; 3 tenths of all.",
            "flags": ("--t-final", "--tfinal"),
        },
    )
    delta_t: int = field(default=1, metadata={"help": "Steps from one choice to the next."})
    orthogonality: float = field(
        default=0.1, metadata={"help": "Weight of the mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖."}
    )
    sensitivity_beta: float = field(
        default=0.85, metadata={"help": "How slowly a weight's importance follows."}
    )
    uncertainty_beta: float = field(
        default=0.85, metadata={"help": "How slowly its uncertainty follows."}
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """b(t), the triplets that are left in a module on average, times `modules`."""

    first: int
    last: int
    t_init: int
    settled: int  # the step from which on the choice stands
    delta_t: int

    def budget(self, step: int, modules: int) -> int:
        """Falls from first to last as (1 - t)³ does, over the steps between t_init and settled."""
        before, after = self.first * modules, self.last * modules
        if step <= self.t_init:
            return before
        if step > self.settled:
            return after
        left = 1 - (step - self.t_init) / (self.settled - self.t_init)
        return int((before - after) * left**3 + after)

    def due(self, step: int) -> bool:
        """Whether triplets are chosen after this step."""
        falling = self.t_init < step < self.settled and step % self.delta_t == 0
        return falling or step == self.settled


def schedule(wanted: Wanted, options: Options) -> Schedule:
    """Raises UsageError for ranks that grow, and for no step in which the budget falls."""
    ranks = [r for r in (options.target_r, wanted.rank) if r is not None]
    if len(set(ranks)) > 1:
        raise UsageError(
            f"--target-r {ranks[0]}: is the rank in the end, and so is --rank {ranks[1]}. Pass one of them."
        )
    last = ranks[0] if ranks else RANK
    first = -(-3 * last // 2) if options.init_r is None else options.init_r
    if not 1 <= last <= first:
        raise UsageError(
            f"--init-r {first}: is where the rank begins, and it falls to --target-r {last}. "
            "Begin with as much at least, and end with 1 or more."
        )
    t_init = wanted.steps // 10 if options.t_init is None else options.t_init
    t_final = 3 * wanted.steps // 10 if options.t_final is None else options.t_final
    if min(t_init, t_final) < 0 or options.delta_t < 1:
        raise UsageError(
            f"--t-init {t_init}, --t-final {t_final}, --delta-t {options.delta_t}: are no such counts "
            "of steps. Pass 0 or more, and 1 or more for --delta-t."
        )
    settled = wanted.steps - t_final
    if wanted.steps and t_init >= settled:
        raise UsageError(
            f"--t-init {t_init}, --t-final {t_final}: leave none of {wanted.steps} steps in which the "
            "budget falls. Train longer, or shorten them."
        )
    return Schedule(first, last, t_init, settled, options.delta_t)


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Alpha is twice the rank at first where it is not said; the rest is what PEFT keeps of a run."""
    plan = schedule(wanted, options)
    betas = options.sensitivity_beta, options.uncertainty_beta
    if not all(0 < beta < 1 for beta in betas) or not options.orthogonality >= 0:
        raise UsageError(
            f"--sensitivity-beta {betas[0]:g}, --uncertainty-beta {betas[1]:g}, --orthogonality "
            f"{options.orthogonality:g}: betas lie between 0 and 1, and the weight is not negative. "
            "0.85, 0.85 and 0.1 are the authors'."
        )
    if wanted.rank_stabilized:
        raise UsageError("--method adalora: is scaled by its first rank alone. Take rsLoRA away.")
    alpha = 2.0 * plan.first if wanted.alpha is None else wanted.alpha
    extra = {
        "init_r": plan.first, "target_r": plan.last, "tinit": plan.t_init,
        "tfinal": wanted.steps - plan.settled, "deltaT": plan.delta_t, "beta1": betas[0],
        "beta2": betas[1], "orth_reg_weight": options.orthogonality, "total_step": wanted.steps,
    }  # fmt: skip
    return AdapterConfig(VARIANT, plan.first, float(alpha), extra=extra)


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """The penalty, and the choice of triplets."""
    from lorasurgery.training.allocation import Allocation

    return Allocation(layers, schedule(wanted, options), options)
