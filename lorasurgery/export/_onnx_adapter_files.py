"""Adapters beside a graph that takes them: one .onnx_adapter each, a manifest, and a run of each to check."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from lorasurgery.dialects import ort_adapter
from lorasurgery.errors import FormatError, VerificationError
from lorasurgery.export._onnx_adapters import Placed
from lorasurgery.export._onnx_session import empty_past, feeds, open_session, switched_on
from lorasurgery.report import Report, Result

FOLDER, LIST = "adapters", "adapters.json"
_TYPES = {"F32": "float32", "F16": "float16"}


def write_adapters(placed: Placed, target: Path) -> None:
    """OUT/adapters/NAME.onnx_adapter, and OUT/adapters.json of names and shapes."""
    home = target / FOLDER
    home.mkdir()
    listed = {}
    for name, adapter in placed.adapters.items():
        file = home / f"{name}.onnx_adapter"
        # one that is called `adapter` lies there already
        with tempfile.TemporaryDirectory(dir=home) as apart:
            ort_adapter.write(adapter, Path(apart))
            os.replace(Path(apart) / "adapter.onnx_adapter", file)
        listed[name] = {
            "file": f"{FOLDER}/{file.name}",
            "ranks": {site.module: site.config.rank for site in adapter.sites},
        }
    inputs = {
        name: {"dtype": _TYPES[one.dtype], "shape": shape}
        for one in placed.inputs
        for name, shape in one.shapes.items()
    }
    content = {
        "format": "onnxruntime AdapterFormat; y = x W + x A B, the scale is in B",
        "ranks": "free: an input that is left out is zero, and changes nothing",
        "adapters": listed, "inputs": inputs,
    }  # fmt: skip
    (target / LIST).write_text(json.dumps(content, indent=2) + "\n")


def check_adapters(placed: Placed, file: Path, folder: Path) -> Report:
    """Run the graph with each adapter on, and say how far it moves. Raises VerificationError where it fails.

    `folder` has the config that tells the sizes of the cache.
    """
    import numpy as np

    session = open_session(file)
    given = feeds(session, np.arange(2, 6), empty_past(session, folder), 0)
    plain = session.run(None, given)[0]
    results = []
    for name, adapter in placed.adapters.items():
        on = switched_on(file.parent / FOLDER / f"{name}.onnx_adapter")
        adapted = session.run(None, given, on.options)[0]
        if not np.isfinite(adapted).all():
            raise VerificationError(
                f"{adapter.path}: with it the outputs are not finite. Look for it in its factors, or "
                "export with --weights fp32."
            )
        moved = float(np.abs(adapted.astype(np.float64) - plain).max())
        ranks = max(site.config.rank for site in adapter.sites)
        numbers = {"rank": float(ranks), "modules": float(len(adapter.sites)), "max_change": moved}
        results.append(Result(f"adapter {name}", numbers, {}, {}))
    note = "adapters are inputs, of any rank each: see adapters.json. Each was loaded and run."
    return Report("export", tuple(results), 0.0, {"adapters": len(results)}, (*placed.notes, note))


def find_adapter(folder: Path, name: str) -> Path:
    """The file of an adapter that was exported with a model. Raises FormatError with those that there are."""
    listed = folder / LIST
    known = json.loads(listed.read_bytes())["adapters"] if listed.is_file() else {}
    if name not in known:
        have = ", ".join(known) or "none"
        raise FormatError(f"{folder}: has no adapter {name!r} to switch on ({have}). Name one.")
    return folder / str(known[name]["file"])
