"""lorasurgery doctor: versions, what runs here, and what is known to go wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorasurgery.cli._options import Printing
from lorasurgery.cli._print import emit, pairs

if TYPE_CHECKING:
    from lorasurgery.operations.doctor import Diagnosis


def command(*, printing: Printing) -> None:
    """Show versions, what runs here, and known problems.

    Example:

        lorasurgery doctor --json
    """
    from lorasurgery.operations.doctor import doctor

    found = doctor()
    emit(_json(found), lambda: _text(found), printing)


def _json(found: Diagnosis) -> dict[str, Any]:
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
    }


def _text(found: Diagnosis) -> str:
    versions = [(name, v or "not installed") for name, v in found.versions.items()]
    works = [(c.name, f"{'yes' if c.works else 'no '}  {c.why}") for c in found.capabilities]
    problems = [f"{p.severity}: {p.what} {p.advice}\n  {p.source}" for p in found.problems]
    blocks = (pairs(versions), pairs(list(found.machine.items())), pairs(works), problems)
    return "\n\n".join("\n".join(block or ["no known problem"]) for block in blocks)
