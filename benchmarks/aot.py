"""Kernels compiled for GPUs that are not here: what a launch would run, as the compiler leaves it.

A launch is recorded on tensors without data, with the constants and the alignments that it has, and
compiled for each chip. Registers, spills and instructions are read from the machine code.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.widths import narrowest
from lorasurgery.kernels._tuning import every


@dataclass(frozen=True)
class Chip:
    """One GPU: what bounds a kernel on it. From the makers' data sheets; per multiprocessor where so said."""

    name: str
    target: GPUTarget
    shared: int  # bytes a program may have
    shared_all: int  # bytes of a multiprocessor
    registers: int  # 32-bit ones of a multiprocessor
    threads: int  # of a multiprocessor
    bandwidth: float  # bytes a second
    flops: float  # of bfloat16 on matrix units, dense
    simple_flops: float  # of float32 outside of them


CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 166912, 167936, 65536, 2048, 2.039e12, 312e12, 19.5e12),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 232448, 233472, 65536, 2048, 3.35e12, 989e12, 67e12),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 232448, 233472, 65536, 2048, 8.0e12, 2250e12, 80e12),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 65536, 65536, 131072, 2048, 5.3e12, 1307e12, 163e12),
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One launch: the function, its grid, and all that it was given."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """`module.function`, without the package."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def constants(self) -> str:
        """The constants and options, as they tell configurations apart."""
        return " ".join(f"{k}={v}" for k, v in self.options.items())


@dataclass(frozen=True)
class Code:
    """What the compiler made of a call for a chip."""

    registers: int
    spills: int  # stores of registers to memory
    shared: int
    warps: int
    matrix: str  # the instruction of the matrix units, or ''; tf32 and xf32 cut float32 to 10 bits
    packed: int  # bits of codes that the layout of their loads gives a thread, 0 without codes
    wide: int  # bits of the narrowest load of codes, or of what becomes codes, in the machine code
    stored: int  # bits of the narrowest store of codes in it
    occupancy: float  # threads that a multiprocessor holds, over those that it could hold


class _Absent:
    """Stands for the driver of a GPU that is not here; each chip is a device of its own."""

    def __init__(self, index: int) -> None:
        self.index = index

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.index].target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Launches within are written down, and not run."""
    calls: list[Call] = []
    run = triton.JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        calls.append(Call(self, grid, args, options))

    triton.JITFunction.run = record
    try:
        yield calls
    finally:
        triton.JITFunction.run = run


def recorded(launch: Callable[[], object], chip: Chip, *, all_configs: bool) -> list[Call]:
    """The launches that a function makes where this chip is, of the first configuration or of each."""
    driver.set_active(_Absent(CHIPS.index(chip)))
    with recording() as calls, every() if all_configs else nullcontext():
        launch()
    return calls


def key(call: Call, chip: Chip) -> str:
    """What the code depends on: sources, constants, kinds and alignments of arguments, chip, compiler."""
    facts = (
        triton.__version__, chip.target, sorted(_functions(call.kernel)), call.constants,
        [_kind(argument) for argument in call.args],
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _functions(kernel: Any) -> dict[str, Any]:
    """The function, and all those that it calls, by their sources."""
    found, left = dict[str, Any](), [kernel]
    while left:
        function = left.pop()
        if function.src not in found:
            found[function.src] = function
            # names of attributes are among these; `tl.dot` costs no more than a look at `dot`
            named = map(function.fn.__globals__.get, function.fn.__code__.co_names)
            left += [other for other in named if isinstance(other, triton.JITFunction)]
    return found


def _kind(argument: Any) -> str:
    """As a launch tells arguments apart."""
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} {argument.data_ptr() % 16 == 0}"
    wide = -(1 << 31) <= argument < 1 << 31
    return "1" if argument == 1 else f"int {wide} {argument % 16 == 0}"


def compiled(call: Call, chip: Chip) -> Code:
    """The call's kernel for this chip; nothing is run."""
    driver.set_active(_Absent(CHIPS.index(chip)))
    done = call.kernel.run(*call.args, grid=call.grid, warmup=True, **call.options)
    functions = _functions(call.kernel).values()
    if chip.target.backend == "hip":
        read, text = _amd, done.asm["amdgcn"]
    else:
        read, text = _nvidia, _disassembled(done.asm["cubin"], done.metadata.name)
    registers, spills, matrix = read(text)
    # the units of matrices may be asked to cut float32
    cut = re.search(r"mma\S*(tf32)|v_mfma_\w*(xf32)", done.asm.get("ptx", text))
    unit = f"{_most(matrix)} {(cut[1] or cut[2]) if cut else ''}".strip()
    shared, warps = done.metadata.shared, done.metadata.num_warps
    return Code(
        registers, spills, shared, warps, unit, _packed(done.asm["ttgir"]), *narrowest(functions, text),
        _occupancy(registers, shared, warps, chip),
    )  # fmt: skip


def _disassembled(cubin: bytes, name: str) -> str:
    """A kernel's use of registers, and its instructions with the lines that they come from."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        return usage[usage.index(name) :] + _tool("nvdisasm", "-c", "-g", file.name)


def _nvidia(text: str) -> tuple[int, int, list[str]]:
    """Registers, spills, and instructions for matrices."""
    registers = int(re.findall(r"REG:(\d+)", text)[0])
    # the stack also serves calls, as of a division: what is spilled is stored to local memory
    spills = len(re.findall(r"\bSTL\b", text))
    # UTC*MMA is tcgen05's, HGMMA Hopper's wgmma, HMMA the one of a warp
    return registers, spills, re.findall(r"\b(UTC\w*MMA|HGMMA|HMMA)\b", text)


def _amd(text: str) -> tuple[int, int, list[str]]:
    """The same."""

    def value(key: str) -> int:
        return max(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)))

    return value("vgpr_count"), value("vgpr_spill_count"), re.findall(r"\bv_(mfma)_", text)


def _occupancy(registers: int, shared: int, warps: int, chip: Chip) -> float:
    # registers are handed out by 8 to a thread, to whole warps
    width = chip.target.warp_size
    per_program = -(-registers // 8) * 8 * warps * width
    programs = min(chip.registers // per_program, chip.threads // (warps * width), 32)
    if shared:
        programs = min(programs, chip.shared_all // shared)
    return float(programs * warps * width / chip.threads)


def _most(names: list[str]) -> str:
    return max(set(names), key=names.count) if names else ""


def _packed(text: str) -> int:
    """Bits of codes that lie together in a thread, by the layouts of all loads of `packed`."""
    layouts = dict(
        re.findall(r"^(#blocked\d*) = .*?sizePerThread = \[([\d, ]+)\]", text, re.MULTILINE)
    )
    loads = re.findall(
        r"%packed\S* = (?:tt\.load|ttg\.async_copy_global_to_local|amdg\.buffer_load) .*?"
        r"(?:ptr<i8>|xi8), (#blocked\d*)>", text,
    )  # fmt: skip
    return 8 * min((int(layouts[name].split(",")[-1]) for name in loads), default=0)


def _tool(name: str, *args: str) -> str:
    """What one of the disassemblers that Triton brings says."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout
