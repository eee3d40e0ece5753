"""doctor --self-test: what is right is said to be, and a wrong kernel is found and named."""

import json
import re
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import typer

from lorasurgery import plugins
from lorasurgery.errors import VerificationError
from lorasurgery.operations.diagnosis import self_test as module
from lorasurgery.operations.diagnosis.peaks import PEAKS, peak
from lorasurgery.operations.diagnosis.self_test import self_test


def kernel(run, reference, **more):
    """A kernel of one case, as a module is one."""
    cases = [("one", (torch.arange(6.0),)), ("two", (torch.arange(8.0),))]
    return SimpleNamespace(run=run, reference=reference, cases=lambda _: iter(cases), **more)


@pytest.fixture
def kernels(monkeypatch):
    """Which kernels there are: put some in."""
    found: dict[str, SimpleNamespace | ModuleType] = {}
    monkeypatch.setattr(plugins, "names", lambda _: sorted(found))
    monkeypatch.setattr(plugins, "load", lambda _, name: found[name])
    return found


def double(x):
    return 2 * x


def test_right_kernels_are_timed_and_their_bytes_counted(kernels):
    big = torch.zeros(1 << 20)
    kernels["plain"] = kernel(double, double, sized=lambda _rng, _side: (big,), cpu=None)
    kernels["several"] = kernel(lambda x: (x, x, 0.1), lambda x: (x, x, 0.1 + 1e-9))
    kernels["near"] = kernel(
        lambda x: x + 1e-3, lambda x: x, tolerance=lambda x: torch.full_like(x, 2e-3)
    )
    kernels["nan"] = kernel(lambda x: -x * np.nan, lambda x: x * np.nan)
    found = self_test()
    assert [(k.name, k.cases, k.wrong) for k in found.kernels] == [
        ("nan", 2, None), ("near", 2, None), ("plain", 2, None), ("several", 2, None),
    ]  # fmt: skip
    plain = found.kernels[2]
    # four bytes an element, read and written
    assert plain.gb_per_s == pytest.approx(8 * (1 << 20) / plain.seconds / 1e9)
    assert [k.form for k in found.kernels] == ["torch", "torch", "numba", "torch"]
    assert found.refuse_wrong() is None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (kernel(lambda x: torch.where(x == 7, -x, x), lambda x: x), "two, result 1: 1 of 8 differ"),
        (kernel(lambda x: x + 0.5, double, tolerance=lambda x: 0 * x + 1), "one, result 1: 4 of 6 differ"),
        (kernel(lambda x: x * np.nan, double, tolerance=lambda x: 0 * x + 9), "one, result 1: 6 of 6 differ"),
        (kernel(lambda x: x.double(), lambda x: x), "one, result 1: another dtype or shape"),
        (kernel(lambda x: x[:5], lambda x: x), "one, result 1: another dtype or shape"),
        (kernel(lambda x: (x, 1.0), lambda x: (x, 1.1)), "one, result 2: 1.0 instead of 1.1"),
        (kernel(lambda x: (x,), lambda x: (x, x)), "one, result 2: another dtype or shape"),
        (kernel(lambda x: (x, x), lambda x: (x,)), "one, result 2: too many results"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_named_with_its_first_wrong_case(kernels, wrong, why):
    kernels["bad"], kernels["good"] = wrong, kernel(double, double)
    found = self_test()
    assert [k.wrong for k in found.kernels] == [why, None]
    message = (
        f"self-test: on {found.device}, 1 of 2 kernels are wrong: bad ({why}). Do not use them here, "
        "and report this with `doctor --json`."
    )
    with pytest.raises(VerificationError, match=f"^{re.escape(message)}$"):
        found.refuse_wrong()


def test_the_command_prints_a_table_and_json_and_exits_with_3_when_one_is_wrong(
    kernels, monkeypatch, capsys
):
    monkeypatch.setattr(module, "peak", lambda _: 1e3)
    kernels["bad"], kernels["good"] = kernel(lambda x: x, double), kernel(double, double)

    def run(*arguments):
        from lorasurgery.cli._errors import one_line
        from lorasurgery.cli._options import Printing
        from lorasurgery.cli.doctor import command

        with pytest.raises(typer.Exit) as exit_, one_line():
            command(self_test=True, printing=Printing(json="--json" in arguments))
        return exit_.value.exit_code, capsys.readouterr()

    code, shown = run()
    assert code == 3
    assert shown.err.startswith("error: self-test: on ")
    head, title, bad, good = shown.out.split("\n\n")[-1].splitlines()
    assert re.fullmatch(r"self-test on .+, whose peak is 1000\.0 GB/s, the maker's", head)
    assert title.split() == ["kernels", "form", "cases", "result", "ms", "GB/s", "of", "peak"]
    assert re.fullmatch(r"bad +torch +2 +WRONG +[\d.]+ +[\d.]+ +\d+ %", bad)
    assert re.fullmatch(r"good +torch +2 +right +[\d.]+ +[\d.]+ +\d+ %", good)
    code, shown = run("--json")
    assert code == 3
    found = json.loads(shown.out)["self_test"]["kernels"]
    assert [(k["name"], k["wrong"]) for k in found] == [
        ("bad", "one, result 1: 5 of 6 differ"),
        ("good", None),
    ]


def test_every_kernel_of_the_registry_is_right_here():
    found = self_test()
    assert [k.name for k in found.kernels] == plugins.names("kernels")
    assert {k.name: k.wrong for k in found.kernels if k.wrong} == {}
    assert all(k.cases and k.seconds > 0 and k.gb_per_s > 0 for k in found.kernels)
    for k in found.kernels:
        assert k.percent_of_peak == pytest.approx(100 * k.gb_per_s / found.peak_gb_per_s)


def test_where_no_maker_is_known_the_peak_is_that_of_a_copy(kernels, monkeypatch):
    monkeypatch.setattr(module, "peak", lambda _: None)
    copied, plain = [], torch.Tensor.copy_

    def copy(y, x):
        copied.append(x.nbytes)
        return plain(y, x)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(module, "_COPIED", 1 << 20)
    monkeypatch.setattr(module, "_seconds", lambda call, _: call() is None or 1e-3)
    kernels["good"] = kernel(double, double)
    found = self_test()
    # read and written, of a millisecond
    assert found.peak_gb_per_s == pytest.approx(2 * (1 << 20) / 1e-3 / 1e9)
    assert (copied, found.peak_is) == ([1 << 20], "of a copy here")
    assert found.kernels[0].percent_of_peak > 0


@pytest.mark.parametrize(
    ("device", "speed"),
    [
        ("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H100 PCIe", 2000), ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039), ("NVIDIA A100-SXM4-40GB", 1555), ("NVIDIA L4", 300),
        ("NVIDIA L40S", 864), ("Tesla T4", 320), ("Tesla V100-SXM2-16GB", 900),
        ("NVIDIA GeForce RTX 4090", 1008), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 5300), ("the processor", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_device_and_of_no_other(device, speed):
    assert peak(device) == speed


def test_no_known_device_is_hidden_by_one_before_it():
    assert {name: peak(f"NVIDIA {name}") for name, _ in PEAKS} == dict(PEAKS)
