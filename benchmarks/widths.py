"""How many bits a thread moves at once where codes, or the weights that become codes, are loaded or stored.

Read from the machine code, whose instructions say by which line of the source they are there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LINES = {
    "load": re.compile(r"\b(?:packed|wide|base) = .*\btl\.load\("),
    "store": re.compile(r"\btl\.store\(.*\.to\(tl\.uint8\)"),
}
# a file's name and a line of it, as Nvidia's disassembler and as AMD's compiler write them
PLACE = re.compile(r'(?://## File ".*?|\.loc\t.*?; )(\w+\.py)(?:", line |:)(\d+)')
NVIDIA = re.compile(r"\b(LDG|LDGSTS|STG)\.E(\S*)")
AMD = re.compile(r"\b(?:global|buffer)_(load|store)_[us]?(dword|byte|short)(?:x(\d))?")
BITS = {"U8": 8, "S8": 8, "byte": 8, "U16": 16, "S16": 16, "short": 16, "64": 64, "128": 128}


def narrowest(functions: Iterable[Any], code: str) -> tuple[int, int]:
    """Bits of the narrowest such load and of the narrowest such store, each 0 where there is none."""
    places = {
        (kind, Path(inspect.getfile(function.fn)).name, number)
        for function in functions
        for number, line in enumerate(*inspect.getsourcelines(function.fn))
        for kind, pattern in LINES.items()
        if pattern.search(line)
    }
    bits: dict[str, list[int]] = {kind: [] for kind in LINES}
    for kind, file, number, size in _moves(code):
        if (kind, file, number) in places:
            bits[kind].append(size)
    return min(bits["load"], default=0), min(bits["store"], default=0)


def _moves(code: str) -> Iterator[tuple[str, str, int, int]]:
    """Each load and store, the line that it comes from, and its bits."""
    file, number = "", 0
    for line in code.splitlines():
        if place := PLACE.search(line):
            file, number = place[1], int(place[2])
        elif move := NVIDIA.search(line):
            sizes = [BITS[part] for part in move[2].split(".") if part in BITS]
            yield "store" if move[1] == "STG" else "load", file, number, min(sizes, default=32)
        elif move := AMD.search(line):
            yield move[1], file, number, BITS.get(move[2], 32) * int(move[3] or 1)
