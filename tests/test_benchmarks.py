"""The benchmark runs, and its checks of one side against the other hold, on a toy model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_files, gpu_layer, gpu_rows
from benchmarks.rows import ROWS
from lorasurgery.operations.diagnosis import self_test

ROOT = Path(__file__).parents[1]


# it starts each peer once
@pytest.mark.timeout(1200)
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


def test_the_gpu_s_benchmark_says_in_one_line_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        # there it is the benchmark itself that is run, by hand
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", tmp_path / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no GPU here: nothing measured\n", "")
    assert not list(tmp_path.iterdir())


def test_the_gpu_s_table_and_record_say_what_was_measured():
    rows = [gpu.Row("linear", (gpu.Side("ours", [2e-6, 1e-6, 9e-6]), gpu.Side("peer", [5e-6])))]
    assert gpu.table(rows).splitlines()[2:] == [
        "| linear | ours | 2.0 |  |",
        "|  | peer | 5.0 | 2.5 |",
    ]
    tested = self_test.SelfTest(
        "NVIDIA Made-up",
        3500.0,
        "the maker's",
        (self_test.Tested("one", "Triton", 3, None, 1e-5, 70.0, 2.0),),
    )
    found = gpu.record(rows, "NVIDIA Made-up", tested)
    assert found["device"] == "NVIDIA Made-up"
    assert found["self_test"]["kernels"][0]["cases"] == 3
    assert found["rows"][0]["sides"][1] == {"name": "peer", "seconds": [5e-6]}


def test_the_gpu_s_benchmark_refuses_to_time_what_is_wrong():
    x = torch.ones(3)
    gpu.check({"ours": lambda: x * (1 + 2.0**-8), "plain": lambda: x}, "linear")
    with pytest.raises(AssertionError, match=r"^linear: ours is wrong$"):
        gpu.check({"ours": lambda: x * 1.1, "plain": lambda: x}, "linear")
    with pytest.raises(AssertionError, match=r"^linear: ours \[2\]$"):
        gpu.check({"ours": lambda: x[:2], "plain": lambda: x}, "linear")


SMALL = gpu_rows.benches(256, (1, 16, 33, 65))


@pytest.mark.parametrize("name", SMALL)
def test_the_sides_of_each_gpu_row_agree_on_a_processor_too(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        sides = SMALL[name](gpu_layer.layer(256, device))
        assert len(sides) > 1
        gpu.check(sides, name)


def test_the_gpu_s_rows_from_file_to_file_run_with_the_processor_in_its_stead(tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the round that is not counted
    rows = gpu_files.rows(tmp_path, 0, device, "toy")
    assert [row.name.partition(",")[0] for row in rows] == [
        "quantize to NF4", "dequantize", "merge a LoRA", "merge a DoRA", "merge a LoRA into NF4",
    ]  # fmt: skip
    for row in rows:
        assert [side.name for side in row.sides] == [f"--device {device}", "the processor"]
