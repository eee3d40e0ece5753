"""Kernels compiled for GPUs that are not here: they fit, spill nothing, and use what the chips have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import CHIPS
from lorasurgery import plugins

ROOT = Path(__file__).parents[1]
# the instructions of the chips' matrix units
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
TILES = {"forward", "backward", "shrink_tiles", "expand_tiles"}
UNPACK = {"matvec", "forward", "backward"}


@pytest.mark.parametrize("chip", [c.name for c in CHIPS])
def test_every_kernel_fits_the_chip_and_uses_it(chip):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--quick", "--json", "--chip", chip]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    launched = {
        n for n in plugins.names("kernels") if hasattr(plugins.load("kernels", n), "launch")
    }
    assert {row["label"].split()[0] for row in rows} == launched
    for row in rows:
        code, function = row["code"], row["kernel"].rpartition(".")[2]
        where = f"{chip} {row['label']} {row['kernel']} {row['constants']}: {code}"
        assert code["spills"] == 0, where
        assert 0 < code["registers"] <= 255, where
        assert code["shared"] <= row["shared_limit"], where
        assert 0 < code["occupancy"] <= 1, where
        assert code["matrix"] == (MATRIX[chip] if function in TILES else ""), where
        if function in UNPACK:
            # AMD's compiler lays tiles of 64 rows and more out by 64 bits
            wide = 128 if chip != "gfx942" or function == "matvec" else 64
            assert code["packed"] >= wide, where
            assert code["wide"] == 128, where
    assert {row["kernel"].rpartition(".")[2] for row in rows} >= TILES | UNPACK
