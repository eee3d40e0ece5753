"""Every variant for every runtime: what is written there is found in order, and merges to the stated error.

A new file in adapters/ is held to it, too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from algebra import cli, facts
from small import base
from test_variant_algebra import changes, off
from test_variant_laws import HELD, MODULES, written

from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.runtimes.claims import RUNTIMES
from lorasurgery.operations.runtimes.near import far

# LyCORIS' IA3 leaves biases as they are, which no IA3 of PEFT's does
LAYOUTS = {variant: dialect for dialect, variant in HELD}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """GGUF's rows are told by the number of heads."""
    path = base(tmp_path / "base")
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "num_key_value_heads": 4}))
    return path


@pytest.mark.parametrize("variant", LAYOUTS)
def test_what_is_written_for_a_runtime_is_read_there_and_merges_as_stated(
    old: Path, tmp_path: Path, variant: str
) -> None:
    adapter = written(tmp_path / "adapter", LAYOUTS[variant], variant, old)
    (site, *_), wanted = open_adapter(adapter).sites, changes(old, adapter)
    for runtime in RUNTIMES:
        out, ask = tmp_path / runtime, ("convert", adapter, "--for", runtime, "--base", old)
        near = far(site, runtime)
        if near:
            code, _, stderr = cli(*ask, "-o", out)
            assert (code, stderr) == (
                1,
                f"error: {adapter}: {MODULES[0]} is a {variant}, which {runtime} is not "
                "known to read and which is no product of small factors. Pass --rank and --base: the nearest LoRA "
                "of that rank is written, with its error. Or merge it.\n",
            )
        stated = facts(*ask, "-o", out, *(("--rank", 3) if near else ()))
        error = off(changes(old, out), wanted)
        assert error == pytest.approx(stated["total"].get("relative_error", 0), rel=2e-3, abs=1e-5)
        assert (error > 1e-3) is near
        assert ("relative_error" in stated["total"]) is near
        code, stdout, stderr = cli("lint", out, "--for", runtime, "--base", old)
        assert code == 0, (stdout, stderr)
