"""Every Triton kernel in every configuration, compiled for four GPUs, none of which need be here: a table.

Times are computed, not measured: the larger of the bytes that must move over the memory's bandwidth and of
the operations over the peak rate. No kernel is as fast; what is left of it, a GPU would have to say. What was compiled once is kept in results/kernels.json by the hash of its sources.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.aot import CHIPS, Call, Chip, Code, compiled, key, recorded
from lorasurgery import plugins
from lorasurgery.kernels import (
    adalora_importance,
    dora_norm,
    grouped_lora,
    lora_linear,
    nf4_linear,
)
from lorasurgery.kernels._packed import Packed

RESULTS = Path(__file__).with_name("results") / "kernels.json"
SIZE = 4096  # outputs and inputs of the layer
RANK, BLOCK, PAGE = 16, 64, 1024

# which axis of the grid has programs that read the same part of an argument again, out of the cache
AGAIN = {
    "matvec": {"codes": 0, "absmax": 0, "nested": 0, "b": 0, "x": 1, "h": 1},
    "forward": {"codes": 0, "absmax": 0, "nested": 0, "b": 0, "x": 1, "h": 1},
    "backward": {"codes": 0, "absmax": 0, "nested": 0, "a": 0, "g": 1, "h": 1},
    "shrink_rows": {"x": 1},
    "expand_rows": {"h": 1},
    "shrink_tiles": {"x": 1},
    "expand_tiles": {"h": 1},
}
# the two halves of the work are one matrix each; half of the pool holds A, half B
HALVES = {"shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles"}


@dataclass(frozen=True)
class Row:
    """A kernel on a chip. Bytes are those that must move; `requested` is what programs ask for, over these."""

    kernel: str
    label: str
    chip: str
    constants: str
    dtype: str  # of what comes first
    code: Code
    shared_limit: int
    bytes: int
    requested: float
    computed_us: float


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(size: int, double: bool) -> Packed:
    """An NF4 weight [size, size]."""
    blocks = -(-size * size // BLOCK)
    kind = torch.uint8 if double else torch.float32
    nested = (empty(-(-blocks // 256)), empty(1)) if double else (None, None)
    codes, absmax = empty(size * size // 2, dtype=torch.uint8), empty(blocks, dtype=kind)
    return Packed(codes, absmax, BLOCK, size, empty(16), *nested)


def linear(m: int, dtype: torch.dtype, double: bool = False, size: int = SIZE) -> object:
    """x Wᵀ + bias for m rows."""
    w = packed(size, double)
    bias = empty(size, dtype=dtype) if double else None
    x = empty(m, size, dtype=dtype)
    return nf4_linear.launch(x, w.codes, w.absmax, BLOCK, size, w.table, bias, w.nested, w.offset)


def lora(m: int, dtype: torch.dtype) -> object:
    """The same with a low-rank term."""
    w, x = packed(SIZE, True), empty(m, SIZE, dtype=dtype)
    a, b = empty(RANK, SIZE, dtype=dtype), empty(SIZE, RANK, dtype=dtype)
    args = w.codes, w.absmax, BLOCK, SIZE, w.table, a, b, 2.0, None, w.nested, w.offset
    return lora_linear.launch(x, *args)


def backward(m: int, dtype: torch.dtype, rank: int) -> object:
    """G W, and with a rank + u A."""
    from lorasurgery.kernels import _nf4_linear_launch

    low = (empty(m, rank, dtype=dtype), empty(rank, SIZE, dtype=dtype)) if rank else None
    return _nf4_linear_launch.backward(empty(m, SIZE, dtype=dtype), SIZE, packed(SIZE, True), low)


def grouped(m: int, dtype: torch.dtype, page: int = PAGE) -> object:
    """64 adapters of rank 16."""
    int32, vectors, per = torch.int32, 64 * RANK, -(-SIZE // page)
    pool, pages = empty(2 * vectors * per, page, dtype=dtype), empty(vectors, per, dtype=int32)
    index = empty(65, dtype=int32), empty(64), pages, pages
    x, adapter = empty(m, SIZE, dtype=dtype), empty(m, dtype=int32)
    return grouped_lora.launch(x, adapter, pool, *index, RANK, SIZE, empty(m, SIZE, dtype=dtype))


Launch = Callable[[], object]


def launches() -> Iterator[tuple[str, Launch]]:
    """Those that together have every configuration of every kernel, in its heaviest form."""
    half, full = torch.bfloat16, torch.float32
    for m in (1, 16, 64, SIZE):
        yield f"lora_linear m={m} nested", partial(lora, m, half)
    for m in (16, 64, SIZE):
        yield f"lora_linear gradient m={m} nested", partial(backward, m, half, RANK)
    for m in (1, 16, SIZE):
        yield f"nf4_linear m={m} float32", partial(linear, m, full)
        yield f"nf4_linear m={m} crossing", partial(linear, m, half, size=SIZE + 32)
        yield f"nf4_linear m={m} crossing float32", partial(linear, m, full, size=SIZE + 32)
    yield "lora_linear gradient float32 nested", partial(backward, SIZE, full, RANK)
    for m in (64, SIZE):
        yield f"grouped_lora m={m}", partial(grouped, m, half)
        yield f"grouped_lora m={m} float32", partial(grouped, m, full)
    yield "dora_output gradient", partial(scaled_backward, True)
    for name in simple():
        yield name, partial(plugins.load("kernels", name).launch, *layer(name))
    w, a, b = layer("dora_norm")
    yield "dora_norm columns", partial(dora_norm.launch, w, a, b, 0)
    w, grad, sensitivity, uncertainty = (x.T.contiguous() for x in layer("adalora_importance")[:4])
    across = partial(adalora_importance.launch, w, grad, sensitivity, uncertainty, 0)
    yield "adalora_importance axis 0", across


def simple() -> list[str]:
    """The kernels without products of matrices."""
    found = [(name, plugins.load("kernels", name)) for name in plugins.names("kernels")]
    return [n for n, k in found if hasattr(k, "launch") and not hasattr(k, "tolerance")]


@cache
def layer(name: str) -> tuple[Any, ...]:
    """What a clock would run a kernel on."""
    args: tuple[Any, ...] = plugins.load("kernels", name).sized(
        torch.Generator().manual_seed(0), SIZE
    )
    return args


def scaled_backward(lora_too: bool) -> object:
    """The gradient of DoRA's output."""
    from lorasurgery.kernels import _dora_launch

    g, x = empty(SIZE, SIZE, dtype=torch.bfloat16), empty(SIZE, SIZE, dtype=torch.bfloat16)
    lora = empty(SIZE, SIZE, dtype=torch.bfloat16) if lora_too else None
    return _dora_launch.scaled_backward(g, x, lora, empty(SIZE))


@cache
def others() -> tuple[tuple[str, Launch], ...]:
    """Other dtypes and flags, in the first configuration."""
    found: list[tuple[str, Launch]] = []
    half = torch.bfloat16
    for m in (1, 16, 64, SIZE):
        found += [
            (f"nf4_linear m={m}", partial(linear, m, half)),
            (f"nf4_linear m={m} nested", partial(linear, m, half, double=True)),
            (f"nf4_linear m={m} float16", partial(linear, m, torch.float16)),
        ]
    for m in (64, SIZE):
        found += [
            (f"grouped_lora m={m} page=10", partial(grouped, m, half, page=10)),
        ]
    found.append(("dora_output gradient alone", partial(scaled_backward, False)))
    for name in simple():
        kernel = plugins.load("kernels", name)
        for label, args in kernel.cases(torch.Generator().manual_seed(0)):
            found.append((f"{name} {label}", partial(kernel.launch, *args)))
    return tuple(found)


def calls(chip: Chip) -> Iterator[tuple[str, Call]]:
    """Launches whose flags, dtypes or block sizes were not among those before."""
    seen = set[Any]()
    for all_configs, group in ((True, launches()), (False, others())):
        for label, launch in group:
            for call in recorded(launch, chip, all_configs=all_configs):
                facts = _facts(call, all_configs or " m=" in label)
                if not facts <= seen:
                    seen |= facts
                    yield label, call


def _facts(call: Call, whole: bool) -> set[Any]:
    """What sets its code apart; of cases of tests, each flag, block size and choice of dtypes for itself."""
    kinds = tuple(str(a.dtype) for a in call.args if isinstance(a, Tensor))
    sizes = {
        "ROWS",
        "SIZE",
        "COLUMNS",
        "WEIGHTS",
        "TRIPLETS",
        "ITEMS",
        "num_warps",
        "enable_fp_fusion",
    }
    some: set[Any] = {(call.name, k, v) for k, v in call.options.items() if k not in sizes}
    some.add((call.name, kinds))
    return {(call.name, call.constants, kinds), *some} if whole else some


def row(label: str, call: Call, chip: Chip, code: Code) -> Row:
    """What memory and arithmetic allow."""
    names = call.kernel.arg_names
    given = dict(zip(names, call.args, strict=False))
    function, grid = call.kernel.fn.__name__, (*call.grid, 1, 1)
    least, asked, counted = 0.0, 0.0, set[int]()
    for name, value in given.items():
        if isinstance(value, Tensor) and id(value) not in counted:
            counted.add(id(value))
            share = 0.5 if name == "pool" and function in HALVES else 1.0
            size = value.numel() * value.element_size() * share
            axis = AGAIN.get(function, {}).get(name)
            least, asked = least + size, asked + size * (1 if axis is None else grid[axis])
    seconds = max(least / chip.bandwidth, operations(function, given) / rate(given, chip))
    return Row(
        call.name, label, chip.name, call.constants, _first(given), code, chip.shared, int(least),
        asked / max(least, 1), seconds * 1e6,
    )  # fmt: skip


def operations(function: str, given: dict[str, Any]) -> float:
    """Multiplications and additions of a product; those of other kernels do not bound them."""
    if function in ("matvec", "forward", "backward"):
        first = given["g" if function == "backward" else "x"]
        rank = given["rank"]
        return float(2 * first.shape[0] * (given["n"] * given["k"] + rank * given["n"]))
    if function in HALVES:
        return float(2 * given["h"].numel() * given["k" if "shrink" in function else "n"])
    return 0.0


def rate(given: dict[str, Any], chip: Chip) -> float:
    """Operations a second for the dtype of what is multiplied."""
    return chip.simple_flops if _first(given) == "float32" else chip.flops


def _first(given: dict[str, Any]) -> str:
    tensor = next(v for v in given.values() if isinstance(v, Tensor))
    return str(tensor.dtype).removeprefix("torch.")


def line(r: Row) -> str:
    """One line of the table."""
    c = r.code
    return (
        f"| {r.label} | {r.kernel} | {r.chip} | {r.constants} | {c.registers} | {c.spills} | "
        f"{c.shared} | {c.occupancy:.0%} | {c.matrix or '-'} | {c.packed or '-'} | "
        f"{r.requested:.2f} | {r.computed_us:.1f} |"
    )


def main() -> None:
    """Print rows as they are compiled, and keep what was; what is known already is not compiled again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", choices=[c.name for c in CHIPS], help="only this one")
    parser.add_argument("--fresh", action="store_true", help="compile what is known too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the codes are kept")
    parser.add_argument(
        "--known",
        action="store_true",
        help="compile nothing, print JSON, null for what is not known",
    )
    options = parser.parse_args()
    chips = [chip for chip in CHIPS if options.chip in (None, chip.name)]
    known = {} if options.fresh else read(options.output)
    if options.known:
        for chip in chips:
            for label, call in calls(chip):
                code = known.get(key(call, chip))
                print(json.dumps(asdict(row(label, call, chip, code)) if code else None))
        return
    print("| case | kernel | chip | constants | registers | spills | shared bytes | occupancy "
          "| matrix unit | bits a load of codes | bytes asked / least | computed µs, not measured |")  # fmt: skip
    print("|" + "---|" * 12)
    needed = set()
    for chip in chips:
        for label, call in calls(chip):
            at = key(call, chip)
            needed.add(at)
            if at not in known:
                known[at] = compiled(call, chip)
                write(options.output, known)
            print(line(row(label, call, chip, known[at])), flush=True)
    if options.chip is None:
        write(options.output, {at: code for at, code in known.items() if at in needed})


def read(file: Path) -> dict[str, Code]:
    """What compilers made of calls, by their keys; but for what was kept when other facts were read."""
    if not file.exists():
        return {}
    known, names = json.loads(file.read_text()), {field.name for field in fields(Code)}
    return {at: Code(**code) for at, code in known.items() if code.keys() == names}


def write(file: Path, known: dict[str, Code]) -> None:
    lines = [f"{json.dumps(at)}: {json.dumps(asdict(known[at]))}" for at in sorted(known)]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
