"""What an operation did: per weight and in all; kept as surgery.json beside the output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import blake3

from lorasurgery import __version__
from lorasurgery.checkpoint import MANIFEST
from lorasurgery.edit import Metrics


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one edit; digests are blake3 of the bytes read and written."""

    name: str
    metrics: Metrics
    read: Mapping[str, str]
    written: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished (or only rehearsed) operation did."""

    operation: str
    results: tuple[Result, ...]  # edits with metrics, in plan order
    seconds: float
    total: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: str = "cpu"  # where it computed, or, of a run that was resumed, the last part of it


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest over many tensors, whatever their order."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return f"blake3:{blake3.blake3(lines.encode()).hexdigest()}"


def manifest(
    report: Report, plan_id: str, settings: Mapping[str, object], inputs: Mapping[str, Path]
) -> bytes:
    """The content of surgery.json; `plan_id` names the command and its inputs."""
    content = {
        "lorasurgery": __version__,
        "operation": report.operation,
        "plan": plan_id,
        "settings": dict(settings),
        "inputs": {role: str(path) for role, path in inputs.items()},
        "base_fingerprint": fingerprint({k: v for r in report.results for k, v in r.read.items()}),
        "device": report.device,
        "seconds": round(report.seconds, 3),
        "total": dict(report.total),
        "notes": list(report.notes),
        "tensors": {
            r.name: {"metrics": dict(r.metrics), "read": r.read, "written": r.written}
            for r in report.results
        },
    }
    return json.dumps(content, indent=1, default=str).encode() + b"\n"


def read_manifest(path: Path, plan_id: str) -> Report | None:
    """The report of an output that this very plan has completed before."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads((path / MANIFEST).read_bytes())
        if content["plan"] == plan_id:
            results = tuple(
                Result(name, t["metrics"], t["read"], t["written"])
                for name, t in content["tensors"].items()
            )
            seconds, total, notes = content["seconds"], content["total"], tuple(content["notes"])
            device = content.get("device", "cpu")
            return Report(content["operation"], results, seconds, total, notes, device)
    return None
