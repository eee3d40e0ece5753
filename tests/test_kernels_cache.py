"""What numba compiles is kept on disk, for who comes next; where nothing can be kept, it is compiled again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorasurgery

PACKAGE = Path(lorasurgery.__file__).parent
CODE = """
import json, numpy as np
from lorasurgery.kernels import _double_cpu, double_dequantize
args = np.full(3, 5, np.uint8), np.ones(1, np.float32), np.float32(0.5)
right = double_dequantize.run(*args) == double_dequantize.TABLE[5] + np.float32(0.5)
stats = _double_cpu.dequantize.stats
found = [sum(x.values()) for x in (stats.cache_hits, stats.cache_misses)]
print(json.dumps({"file": double_dequantize.__file__, "right": right.tolist(), "hits, misses": found}))
"""


@pytest.fixture
def site(tmp_path):
    """The package, installed somewhere else, with nothing compiled."""
    ignore = shutil.ignore_patterns("__pycache__", "training", "export")
    shutil.copytree(PACKAGE, tmp_path / "site" / "lorasurgery", ignore=ignore)
    return tmp_path / "site"


def run(site, **env):
    """[from the cache, compiled], of a kernel that is called in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_CACHE", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False,
        cwd=site, env={**kept, "PYTHONPATH": str(site), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"].startswith(str(site))
    assert found["right"] == [True] * 3
    return found["hits, misses"]


def kept(folder):
    return sorted(folder.rglob("*.nbc"))


def test_a_kernel_is_compiled_once_and_read_by_the_next_process(site):
    folder = site / "lorasurgery" / "kernels"
    assert run(site) == [0, 1]
    first = kept(folder)
    assert len(first) > 0
    assert run(site) == [1, 0]
    # code is inlined from other files, so that a change of any is a change of all
    with (folder / "_floats.py").open("a") as file:
        file.write("# changed\n")
    assert run(site) == [0, 1]


def test_a_home_of_the_user_is_used_where_the_package_cannot_be_written(site, tmp_path):
    (site / "lorasurgery" / "kernels" / "__pycache__").write_text("in the way of a directory")
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert [run(site, **home), run(site, **home)] == [[0, 1], [1, 0]]
    assert len(kept(tmp_path / "home")) > 0


@pytest.mark.parametrize("named", [{}, {"NUMBA_CACHE_DIR": "/dev/null/cache"}])
def test_a_kernel_works_where_neither_package_nor_home_can_be_written(site, named):
    # of which root could write to a directory that is only said to be read-only
    (site / "lorasurgery" / "kernels" / "__pycache__").write_text("in the way of a directory")
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", **named}
    for _ in range(2):
        assert run(site, **nowhere)[0] == 0
    assert kept(site) == []
