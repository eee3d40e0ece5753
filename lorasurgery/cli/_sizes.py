"""Sizes as people write them: 512MB is 512 * 1000^2 bytes, 2GiB is 2 * 1024^3."""

from __future__ import annotations

import re

import typer

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B", re.IGNORECASE)


def size(text: str | int) -> int:
    """Bytes; a bare number is refused in text, for people mean different units by it."""
    if isinstance(text, int):  # an option's default
        return text
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise typer.BadParameter(f"{text!r} is no size. Write it as 512MB or 2GiB.")
    number, power, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power.upper()])


def show_bytes(n: float) -> str:
    """Bytes in the unit that keeps the number short: 1.21 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"


def show_count(n: float) -> str:
    """A number of parameters: 134.5 M."""
    for unit in ("", " K", " M", " B"):
        if n < 1000:
            return f"{n:.0f}" if not unit else f"{n:.4g}{unit}"
        n /= 1000
    return f"{n:.4g} T"
