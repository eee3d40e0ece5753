"""lorasurgery doctor: versions, what runs here, and what is known to go wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasurgery.cli._options import Printing
from lorasurgery.cli._print import emit, pairs, table

if TYPE_CHECKING:
    from lorasurgery.operations.diagnosis.self_test import SelfTest
    from lorasurgery.operations.doctor import Diagnosis


def command(
    *,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Try every kernel on the GPU, or on the CPU without one."),
    ] = False,
    printing: Printing,
) -> None:
    """Show versions, what runs here, and known problems.

    Example:

        lorasurgery doctor --self-test
    """
    from lorasurgery.operations.doctor import doctor

    found = doctor()
    tested = _self_test() if self_test else None
    emit(_json(found, tested), lambda: _text(found, tested), printing)
    if tested:
        tested.refuse_wrong()


def _self_test() -> SelfTest:
    from lorasurgery.operations.diagnosis.self_test import self_test

    return self_test()


def _json(found: Diagnosis, tested: SelfTest | None) -> dict[str, Any]:
    problems = [
        {
            "name": p.name,
            "severity": p.severity,
            "what": p.what,
            "advice": p.advice,
            "source": p.source,
        }
        for p in found.problems
    ]
    return {
        "versions": dict(found.versions),
        "machine": dict(found.machine),
        "capabilities": [asdict(capability) for capability in found.capabilities],
        "problems": problems,
        **({"self_test": asdict(tested)} if tested else {}),
    }


def _text(found: Diagnosis, tested: SelfTest | None) -> str:
    versions = [(name, v or "not installed") for name, v in found.versions.items()]
    works = [(c.name, f"{'yes' if c.works else 'no '}  {c.why}") for c in found.capabilities]
    problems = [f"{p.severity}: {p.what} {p.advice}\n  {p.source}" for p in found.problems]
    blocks = [pairs(versions), pairs(list(found.machine.items())), pairs(works), problems]
    blocks += [_kernels(tested)] if tested else []
    return "\n\n".join("\n".join(block or ["no known problem"]) for block in blocks)


def _kernels(tested: SelfTest) -> list[str]:
    rows = [("kernels", "form", "cases", "result", "ms", "GB/s", "of peak")]
    for k in tested.kernels:
        share, result = f"{k.percent_of_peak:.0f} %", "WRONG" if k.wrong else "right"
        speed = f"{1000 * k.seconds:.3f}", f"{k.gb_per_s:.1f}"
        rows.append((k.name, k.form, str(k.cases), result, *speed, share))
    peak = f"{tested.peak_gb_per_s:.1f} GB/s, {tested.peak_is}"
    return [f"self-test on {tested.device}, whose peak is {peak}", *table(rows)]
