"""Rows of a kernel over threads: how many, which, and what becomes of errors and of forks."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from lorasurgery.kernels import _threads, nf4_dequantize, nf4_matvec, nf4_quantize
from lorasurgery.surgery import TILE_BYTES


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_follow_torch_where_it_is_loaded():
    torch.set_num_threads(3)
    assert _threads.count() == 3


def test_threads_follow_the_affinity_where_torch_is_not_loaded():
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from lorasurgery.kernels import _threads\n"
        "print(_threads.count(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


@pytest.mark.parametrize(
    ("threads", "rows", "least", "parts"),
    [
        (1, 10, 1, [(0, 10)]),
        (3, 10, 1, [(0, 3), (3, 6), (6, 10)]),
        (3, 10, 5, [(0, 5), (5, 10)]),
        (3, 10, 6, [(0, 10)]),
        (3, 0, 1, [(0, 0)]),
        (2, 4, 0, [(0, 2), (2, 4)]),
    ],
)
def test_each_row_is_worked_on_once_and_no_part_is_too_small(threads, rows, least, parts):
    torch.set_num_threads(threads)
    seen, names = [], set()

    def work(start, stop):
        seen.append((start, stop))
        names.add(threading.current_thread().name)

    _threads.over_rows(work, rows, least)
    assert sorted(seen) == parts
    # the caller takes the first part, and nobody else is asked where there is one
    assert threading.main_thread().name in names
    assert (len(names) == 1) == (len(parts) == 1)


def test_an_error_in_another_thread_is_the_callers():
    torch.set_num_threads(2)

    def work(start, _):
        if start:
            raise ZeroDivisionError("the second half")

    with pytest.raises(ZeroDivisionError, match=r"^the second half$"):
        _threads.over_rows(work, 2, 1)


def test_a_forked_child_gets_threads_of_its_own():
    code = """
import os, numpy as np
from lorasurgery.kernels import _threads
_threads.count = lambda: 2
_threads.over_rows(lambda start, stop: None, 2, 1)
if pid := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
else:
    _threads.over_rows(lambda start, stop: None, 2, 1)
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=False, timeout=60, env=dict(os.environ),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_matvec_has_the_same_bits_on_any_number_of_threads():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((601, 2048), np.float32)
    codes, absmax = nf4_quantize.run(w.reshape(-1), 64)
    x = rng.standard_normal((1, 2048), np.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(nf4_matvec.run(x, codes, absmax, 64, 601, nf4_dequantize.NF4))
    np.testing.assert_array_equal(found[0].view(np.uint32), found[1].view(np.uint32))
    np.testing.assert_array_equal(found[0].view(np.uint32), found[2].view(np.uint32))
    # and they are those of the product, to the rounding of float32 sums
    kind = np.dtype(np.float32)
    decoded = nf4_dequantize.run(codes, absmax, 64, w.size, kind, nf4_dequantize.NF4)
    decoded = decoded.reshape(w.shape).astype(np.float64)
    bound = (
        40 * 2.0**-24 * (np.abs(decoded) @ np.abs(x[0]))
    )  # 2048 / 64 + log2 64 sums and a product
    assert (np.abs(found[0][0] - decoded @ x[0].astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("seed", [None, 5])
def test_codes_and_weights_have_the_same_bits_on_any_number_of_threads(seed, monkeypatch):
    # three spans, and a short last block of an odd number of weights
    w = np.random.default_rng(0).standard_normal(64 * 700 + 33, np.float32)
    monkeypatch.setattr(nf4_dequantize, "LEAST", 64 * 200)
    parts, plain = [], _threads.over_rows

    def over_rows(work, rows, least):
        def seen(start, stop):
            parts.append((start, stop))
            work(start, stop)

        plain(seen, rows, least)

    monkeypatch.setattr(_threads, "over_rows", over_rows)
    kept, found = np.full(701, 0.7, np.float32), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parts.clear()
        codes, absmax = nf4_quantize.run(w, 64, None, seed, 77)
        assert len(parts) == threads
        bound, _ = nf4_quantize.run(w, 64, kept, seed, 77)
        kind = np.dtype(np.float16)
        decoded = nf4_dequantize.run(codes, absmax, 64, w.size, kind, nf4_dequantize.NF4)
        assert len(parts) == 3 * threads
        found.append([codes, absmax, bound, decoded])
    for one, two, three in zip(*found, strict=True):
        assert one.tobytes() == two.tobytes() == three.tobytes()


def test_a_tile_of_an_operation_stays_in_its_thread():
    """The engine has a thread for every processor already."""
    # a tile is of at most so many bytes, and a weight of at least two
    assert nf4_dequantize.LEAST >= TILE_BYTES // 2
