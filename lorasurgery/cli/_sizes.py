"""Sizes as people write them: 512MB is 512 * 1000^2 bytes, 2GiB is 2 * 1024^3."""

from __future__ import annotations

import re

import typer

from lorasurgery.errors import ValueRangeError

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


_COUNT = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)", re.IGNORECASE)


def count(text: str) -> int:
    """Parameters: 500000, 2.5M. Raises ValueRangeError for what is neither that nor a size."""
    found = _COUNT.fullmatch(text.strip())
    if not found:
        raise ValueRangeError(
            f"{text!r} is no number of parameters and no size. Write it as 2.5M or 40MiB."
        )
    return int(float(found[1]) * 1000 ** _POWERS[found[2].upper()])


def is_size(text: str) -> bool:
    """Whether the text says bytes."""
    return bool(_SIZE.fullmatch(text.strip()))


def ranks(text: str | None) -> tuple[int, ...]:
    """A list of ranks: 8,16,32. Raises ValueRangeError."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if bad := [part for part in parts if not part.isdecimal()]:
        raise ValueRangeError(f"--ranks-allowed: {bad[0]!r} is no rank. Write them as 8,16,32.")
    return tuple(map(int, parts))


def shares(text: str) -> tuple[float, ...]:
    """A list of gates: 0.3,0.7. Raises ValueRangeError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueRangeError(
            f"--gates: {text!r} is no list of numbers. Write it as 0.3,0.7, or as uniform."
        ) from None


def show_bytes(n: float) -> str:
    """Bytes in the unit that keeps the number short: 1.21 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
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
