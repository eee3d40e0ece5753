"""ONNX models over 2 GiB, made of holes: what is held in memory is a few tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as h
import pytest

from lorasurgery.checkpoint import open_checkpoint
from tests import onnx_files as made

TABLES, ROWS, COLUMNS = 9, 1024, 65536
NBYTES = 4 * ROWS * COLUMNS  # of a table: 256 MiB
UP = (96, 64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Tables that are looked up in, whose ends are no zeros, and one product."""
    held: dict[str, np.ndarray | onnx.TensorProto] = {"up.weight": made.drawn(*UP[::-1])}
    nodes = [h.make_node("MatMul", ["x", "up.weight"], ["y"], "/up/MatMul")]
    with (tmp_path / "m.data").open("wb") as file:
        os.truncate(file.fileno(), TABLES * NBYTES)
        for i in range(TABLES):
            file.seek((i + 1) * NBYTES - 4)
            file.write(np.float32(i + 1).tobytes())
            table = onnx.TensorProto(
                name=f"t{i}", data_type=1, dims=[ROWS, COLUMNS], data_location=1
            )
            for key, value in (("location", "m.data"), ("offset", i * NBYTES), ("length", NBYTES)):
                table.external_data.add(key=key, value=str(value))
            held[f"t{i}"] = table
            nodes.append(h.make_node("Gather", [f"t{i}", "at"], [f"row{i}"], f"/t{i}/Gather"))
    return made.save(tmp_path / "m.onnx", nodes, {**held, "at": np.array(5)}, UP[::-1])


def peak_of(*arguments: object) -> int:
    """Bytes of memory that a command came to hold at most, pages of files counted in."""
    code = (
        "import os, re, sys; from pathlib import Path; from lorasurgery.cli.app import app; "
        # threads are as many as processors
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]); "
        "app(sys.argv[1:], standalone_mode=False); "
        # the kernel's other figure, ru_maxrss, begins with that of who started the process
        "print('peak', *re.findall(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text()))"
    )
    texts = [sys.executable, "-c", code, *map(str, arguments)]
    shown = subprocess.run(texts, check=True, capture_output=True, text=True).stdout
    return 1024 * int(shown.splitlines()[-1].removeprefix("peak "))


def test_merge_verify_and_unmerge_hold_a_few_tensors_of_a_model_over_two_gigabytes(
    base: Path, tmp_path: Path
) -> None:
    adapter = made.adapter(tmp_path / "a", {"up": UP})
    out, undo, home = tmp_path / "o.onnx", tmp_path / "u", tmp_path / "back"
    home.mkdir()
    most = 3 * NBYTES
    assert peak_of("merge", base, adapter, "-o", out, "--undo", undo) < most
    onnx.checker.check_model(out)
    merged = open_checkpoint(out)
    assert merged.storage("t0")[1] * TABLES > 2 << 30
    want = made.drawn(*UP[::-1]) + made.delta(adapter, "up").T
    np.testing.assert_allclose(merged.read("up.weight"), want, rtol=0, atol=1e-7)
    assert [merged.read(f"t{i}")[-1, -1] for i in range(TABLES)] == list(range(1, TABLES + 1))
    # of two files, by two threads
    assert peak_of("verify", out, "--base", base, "-a", adapter) < 5 * NBYTES
    assert peak_of("unmerge", out, adapter, "-o", home / "b.onnx", "--undo", undo) < most
    assert (home / "b.onnx").read_bytes() == base.read_bytes()
    back = open_checkpoint(home / "b.onnx")
    assert [back.read(f"t{i}")[-1, -1] for i in range(TABLES)] == list(range(1, TABLES + 1))
    assert undo.stat().st_size < 1 << 20
