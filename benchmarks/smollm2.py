"""SmolLM2-135M-Instruct in float32, made once of the GGUF file that the demo takes, and text for it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.processes import run
from benchmarks.racing import OURS
from benchmarks.run import SCRATCH, processor, say
from demo.run import ANSWERS, gguf

HELD_OUT = 8  # of the demo's forty answers


def base(scratch: Path = SCRATCH) -> Path:
    path = scratch / "SmolLM2-135M-Instruct"
    if not path.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        say(f"making {path}")
        run((*OURS, "convert-checkpoint", gguf(), "-o", path, "--dtype", "float32"))
    return path


def text(folder: Path) -> tuple[Path, Path]:
    """To learn from, and held out."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ANSWERS.read_text().splitlines(keepends=True)
    parts = {"learned.jsonl": lines[:-HELD_OUT], "held-out.jsonl": lines[-HELD_OUT:]}
    for name, part in parts.items():
        (folder / name).write_text("".join(part))
    return folder / "learned.jsonl", folder / "held-out.jsonl"


def digest(path: Path) -> str:
    """Of a directory's weights."""
    found = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def write(output: Path, told: dict[str, Any]) -> None:
    """JSON, with where it was found."""
    where = {
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**where, **told}, indent=1) + "\n")
    print(f"wrote {output}", file=sys.stderr)
