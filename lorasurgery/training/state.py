"""All that a run needs to go on as if it had never stopped, in one file that is complete or absent."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasurgery.errors import FormatError
from lorasurgery.place import writing


@dataclass(slots=True)
class Best:
    """The evaluation with the lowest loss, and what was trained then."""

    loss: float
    step: int
    parameters: dict[str, Tensor]
    method: dict[str, Any]


@dataclass(slots=True)
class State:
    """After `step` optimizer steps. The position in the data follows from the step."""

    step: int
    tokens: int  # that had a label so far
    parameters: dict[str, Tensor]  # every factor and every module that is trained whole, by name
    optimizer: dict[str, Any]
    method: dict[str, Any]  # what Hooks.state gave
    chance: dict[str, Tensor]  # the generators' states, by device: dropout draws from them
    metrics: int  # bytes of the metrics file that belong to these steps
    losses: list[float]  # of the last steps
    best: Best | None = None
    stale: int = 0  # evaluations since the best one


def save(state: State, path: Path) -> None:
    """Raises OutputError, and leaves the file that was there, if the disk is full."""
    part = path.with_name(path.name + ".part")
    content: dict[str, Any] = {f.name: getattr(state, f.name) for f in fields(State)}
    if state.best:
        content["best"] = {f.name: getattr(state.best, f.name) for f in fields(Best)}
    with writing(path, "the state"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                try:
                    torch.save(content, file)
                except RuntimeError as error:
                    # torch's writer tells of a full disk in its own words
                    raise _as_os_error(error) from error
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _as_os_error(error: BaseException) -> OSError:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__context__
    return OSError(0, str(error).splitlines()[0])


def load(path: Path) -> State:
    """Raises FormatError for a file that holds no state."""
    try:
        content = torch.load(path, weights_only=True)
        best = content["best"]
        return State(**{**content, "best": Best(**best) if best else None})
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise FormatError(
            f"{path}: holds no state of a run ({reason}). Begin anew with --overwrite."
        ) from None
