"""The benchmark runs, and its checks of one side against the other hold, on a toy model."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import ROWS

ROOT = Path(__file__).parents[1]


def test_every_row_runs_on_a_toy_model_and_both_sides_agree(tmp_path):
    output = tmp_path / "toy.json"
    command = [sys.executable, "-m", "benchmarks.run", "--small", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--scratch", tmp_path, "--output", output],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == len(ROWS)
    for row in rows:
        assert row["sides"][0]["name"] == "lorasurgery"
        assert row["sides"][0]["times_ours"] == 1.0
        assert all(side["seconds"] > 0 for side in row["sides"])
        assert f"| {row['name']} | lorasurgery |" in done.stdout
