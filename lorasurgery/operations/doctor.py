"""Doctor: what is installed, what runs where on this machine and why, and what is known to go wrong."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from lorasurgery import __version__
from lorasurgery.operations.diagnosis.known_problems import Facts, Problem, known_problems

PACKAGES = (
    "torch", "triton", "numba", "numpy", "ml_dtypes", "safetensors", "huggingface_hub", "gguf",
    "transformers", "peft", "bitsandbytes", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai", "onnxruntime-genai-cuda", "vllm",
)  # fmt: skip
# what kernels of this field look for in a processor
_FLAGS = (
    "avx2", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Capability:
    """One way to compute: whether it works here, and why (not)."""

    name: str
    works: bool
    why: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`versions` are None for what is not installed."""

    versions: Mapping[str, str | None]
    machine: Mapping[str, str]
    capabilities: tuple[Capability, ...]
    problems: tuple[Problem, ...]


def doctor() -> Diagnosis:
    """Look at this environment; imports numba, torch and onnxruntime, and runs no kernel."""
    flags = cpu_flags(Path("/proc/cpuinfo"))
    versions = {"lorasurgery": __version__, "python": platform.python_version(), **_versions()}
    driver = _has_driver()
    torch_cuda, gpu = _gpu(driver)
    facts = Facts(versions, flags, torch_cuda, driver, _wanted_triton())
    shown = ", ".join(flag for flag in _FLAGS if flag in flags)
    machine = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": str(len(os.sched_getaffinity(0))),
        "processor features": shown or "unknown",
    }
    capabilities = (_cpu_kernels(), gpu, _triton(gpu, versions["triton"]), _onnxruntime(driver))
    return Diagnosis(versions, machine, capabilities, tuple(known_problems(facts)))


def cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The features that Linux names; none where there is no such file."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return frozenset(
        flag
        for key, _, value in named
        if key.strip() in ("flags", "Features")
        for flag in value.split()
    )


def _versions() -> dict[str, str | None]:
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wanted_triton() -> str | None:
    """The specifier that torch's own metadata has for triton on this machine."""
    try:
        lines = requires("torch") or []
    except PackageNotFoundError:
        return None
    for requirement in map(Requirement, lines):
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "triton" and here:
            return str(requirement.specifier)
    return None


def _has_driver() -> bool:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _cpu_kernels() -> Capability:
    """numba refuses to be imported beside a numpy that it does not know."""
    name = "CPU kernels (numba)"
    try:
        import numba
    except (ImportError, OSError) as error:
        return Capability(name, works=False, why=_reason(error))
    return Capability(
        name, works=True, why=f"numba {numba.__version__} compiles for this processor"
    )


def _gpu(driver: bool) -> tuple[str | None, Capability]:
    """The CUDA that torch is built for, and the devices it sees."""
    name = "GPU (torch)"
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, Capability(name, works=False, why=_reason(error))
    built = torch.version.cuda
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(
            f"{d.name} ({d.total_memory >> 30} GiB, sm_{d.major}{d.minor})" for d in devices
        )
        return built, Capability(name, works=True, why=names)
    if built is None and torch.version.hip is None:
        why = "torch is built for the CPU alone"
    elif driver:
        why = f"torch is built for CUDA {built}, the driver is here, but offers it no device"
    else:
        why = f"torch is built for CUDA {built}, but there is no driver (libcuda.so.1)"
    return built, Capability(name, works=False, why=why)


def _triton(gpu: Capability, installed: str | None) -> Capability:
    name = "Triton kernels"
    if installed is None:
        return Capability(name, works=False, why="triton is not installed; it runs on Linux")
    if not gpu.works:
        why = "no GPU; TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests"
        return Capability(name, works=False, why=why)
    return Capability(name, works=True, why=f"triton {installed} on {gpu.why}")


def _onnxruntime(driver: bool) -> Capability:
    name = "ONNX Runtime"
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        return Capability(name, works=False, why=_reason(error))
    built = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    idle = [] if driver else [p for p in built if p in ("CUDA", "Tensorrt")]
    running = ", ".join(p for p in built if p not in idle)
    without = f"; {' and '.join(idle)} lack a driver" if idle else ""
    return Capability(name, works=True, why=f"providers: {running}{without}")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())
