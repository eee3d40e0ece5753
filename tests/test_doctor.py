"""doctor: what is installed and runs is what is really there, and each known problem is recognised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pytest
import torch

from lorasurgery.operations.diagnosis.known_problems import PROBLEMS, Facts, known_problems
from lorasurgery.operations.doctor import cpu_flags

GOOD = Facts(
    versions={
        "torch": "2.13.0", "triton": "3.7.1", "onnxruntime-gpu": "1.31.1", "peft": "0.22.0",
        "transformers": "5.24.0", "bitsandbytes": "0.50.2", "onnxruntime": None, "vllm": None,
    },
    cpu_flags=frozenset({"avx2", "avx512f"}), torch_cuda="13.0", driver=True, wanted_triton="==3.7.1",
)  # fmt: skip


def but(**versions: str | None) -> Facts:
    return replace(GOOD, versions={**GOOD.versions, **versions})


OLD_PEFT = {"peft-weighted-linear", "peft-weighted-variants", "transformers-wants-newer-peft"}


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        (GOOD, set()),
        (but(onnxruntime="1.31.1"), {"two-onnxruntimes"}),
        (but(**{"onnxruntime-genai": "0.9", "onnxruntime-genai-cuda": "0.9"}), {"two-genais"}),
        (but(peft="0.21.2"), OLD_PEFT | {"peft-convert-dora"}),
        (but(peft="0.18.0"), OLD_PEFT),
        (but(peft="0.21.2", transformers="5.20.0"), OLD_PEFT - {"transformers-wants-newer-peft"} | {"peft-convert-dora"}),
        (replace(GOOD, cpu_flags=frozenset({"avx512_bf16"})), {"bitsandbytes-repacks"}),
        (but(bitsandbytes="0.45.0"), {"old-bitsandbytes"}),
        (but(vllm="0.12.0"), {"vllm-drops-patterns"}),
        (replace(GOOD, driver=False), {"cuda-build-without-driver"}),
        (replace(GOOD, torch_cuda=None), {"driver-without-cuda-build"}),
        (but(triton="3.9.0"), {"another-triton"}),
        (but(triton=None), set()),
    ],
)  # fmt: skip
def test_a_problem_is_named_where_it_is_and_nowhere_else(facts: Facts, names: set[str]) -> None:
    assert {problem.name for problem in known_problems(facts)} == names


def test_each_problem_says_what_to_do_and_who_says_so() -> None:
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS)
    for problem in PROBLEMS:
        assert problem.severity in ("wrong", "broken", "slow")
        assert problem.what.endswith(".")
        assert problem.advice.endswith(".")
        assert problem.source


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """doctor with a directory before everything else on the path."""
    env = dict(os.environ)
    if path:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "lorasurgery", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


def test_it_reports_what_is_installed_and_what_runs() -> None:
    done = run("--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    for name in ("torch", "numba", "peft", "onnxruntime-gpu", "gguf"):
        assert found["versions"][name] == version(name)
    assert found["versions"]["vllm"] is None
    works = {c["name"]: (c["works"], c["why"]) for c in found["capabilities"]}
    assert works["CPU kernels (numba)"][0]
    assert works["GPU (torch)"][0] == works["Triton kernels"][0] == torch.cuda.is_available()
    assert all(
        provider.removesuffix("ExecutionProvider") in works["ONNX Runtime"][1]
        for provider in onnxruntime.get_available_providers()
    )


def test_it_prints_versions_capabilities_and_problems_in_blocks() -> None:
    versions, machine, capabilities, *_ = run().stdout.split("\n\n")
    assert versions.splitlines()[0].startswith("lorasurgery ")
    assert [line.split()[0] for line in machine.splitlines()] == [
        "system",
        "processors",
        "processor",
    ]
    assert len(capabilities.splitlines()) == 4


def package(folder: Path, name: str, version: str, requires: str = "") -> None:
    """What pip leaves behind of a package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    )


def test_problems_of_a_real_environment_are_seen_in_its_metadata(tmp_path: Path) -> None:
    package(tmp_path, "onnxruntime", "1.20.0")
    package(tmp_path, "torch", "2.99", "triton==3.99; python_version >= '3'")
    package(tmp_path, "peft", "0.17.0")
    found = json.loads(run("--json", path=tmp_path).stdout)
    assert found["versions"]["onnxruntime"] == "1.20.0"
    names = {problem["name"] for problem in found["problems"]}
    assert {"two-onnxruntimes", "another-triton", "peft-weighted-linear"} <= names
    assert "peft-convert-dora" not in names
    assert "broken: onnxruntime and onnxruntime-gpu are both installed" in run(path=tmp_path).stdout


def test_a_package_that_refuses_to_load_is_told_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less.')")
    (tmp_path / "onnxruntime.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    lines = run(path=tmp_path).stdout.splitlines()
    assert "CPU kernels (numba)  no   Numba needs NumPy 2.3 or less." in lines
    assert "ONNX Runtime         no   libcudart.so.13: cannot open" in lines


def test_processor_features_are_read_as_linux_lists_them(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text(
        "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\n"
    )
    (tmp_path / "arm").write_text("Features\t: fp asimd sve bf16\n")
    assert cpu_flags(tmp_path / "x86") == {"fpu", "avx2", "avx512_bf16"}
    assert cpu_flags(tmp_path / "arm") == {"fp", "asimd", "sve", "bf16"}
    assert cpu_flags(tmp_path / "nowhere") == set()
