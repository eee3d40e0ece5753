"""From a live module's path, as a trainer saw it, to the tensors of a checkpoint."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lorasurgery.layouts import EXPERTS, RENAMES
from lorasurgery.plugins import suggestion
from lorasurgery.unet_names import diffusers_name

_Rename = Callable[[str], str]

# a module whose path is joined to one word, perhaps below another: no trainer with dots has such names
_JOINED = re.compile(r"(\w+\.)?\w+_\w+\.\w+")


@dataclass(frozen=True, slots=True)
class Part:
    """The share of a parameter that one stored tensor holds.

    `expert`: the tensor is one expert's; None for a plain weight, or a whole stack.
    `rows`: which rows of that expert's matrix, as it is stored, it holds; None for all.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class Names:
    """A checkpoint's names, and how those of one adapter are read in it."""

    def __init__(self, stored: Iterable[str], wanted: Sequence[str]) -> None:
        """`wanted` are the adapter's parameters (path.weight): renamings that find many come first."""
        self.stored = set(stored)
        self._joined = _by_joined_name(self.stored)
        self._tops = sorted({name.partition(".")[0] for name in self.stored})
        found = [(sum(self._known(r(n)) for n in wanted), r) for r in self._renamings(wanted)]
        self._renames = [r for hits, r in sorted(found, key=lambda pair: -pair[0]) if hits]

    def find(self, name: str) -> str | None:
        """The stored name of a live parameter, or None."""
        # torch's MultiheadAttention holds q, k and v in one matrix without a module of its own
        inner = re.sub(r"\.weight$", ".in_proj_weight", name)
        tries = [rename(n) for n in (name, inner) for rename in (*self._renames, _as_it_is)]
        plain = next((n for n in tries if n in self.stored), None)
        return plain or next((n for n in map(self._unjoined, tries) if n), None)

    def parts(self, name: str, rows: int, experts: int) -> list[Part]:
        """Where a live parameter is stored: one tensor, or a few for each expert; [] if nowhere.

        rows: of one expert's matrix; experts: in the stack, 1 for a plain weight.
        """
        if (stored := self.find(name)) is not None:
            return [Part(stored)]
        if experts == 1 and not self._split(name, 0):
            return []
        found = []
        for expert in range(experts):
            names = self._split(name, expert)
            if not names or rows % len(names):
                return []
            step = rows // len(names)
            found += [
                Part(n, expert, (i * step, (i + 1) * step) if len(names) > 1 else None)
                for i, n in enumerate(names)
            ]
        return found

    def nearest(self, name: str) -> str:
        """A sentence that names the stored name most like this one."""
        return suggestion(name, sorted(self.stored))

    def _split(self, name: str, expert: int) -> list[str]:
        """The tensors of one expert, by the first naming that has them all."""
        module, _, parameter = name.rpartition(".")
        for names in EXPERTS.get(parameter, ()):
            found = [self.find(f"{module}.{expert}.{n}.weight") for n in names]
            if all(found):
                return [n for n in found if n]
        return []

    def _known(self, name: str) -> bool:
        module, _, parameter = name.rpartition(".")
        if parameter not in EXPERTS or name in self.stored:
            return name in self.stored or self._unjoined(name) is not None
        return any(f"{module}.0.{n[0]}.weight" in self.stored for n in EXPERTS[parameter])

    def _unjoined(self, name: str) -> str | None:
        """The one stored name that reads so with `_` for `.`, as kohya's files have modules; or None."""
        if _JOINED.fullmatch(name) is None:
            return None
        found = self._joined.get(_join(name), [])
        return found[0] if len(found) == 1 else None

    def _renamings(self, wanted: Sequence[str]) -> list[_Rename]:
        """Identity first; then a prefix less (GPT-2's `transformer.`), a prefix more, known renames."""
        heads = sorted({name.partition(".")[0] for name in wanted})
        return [
            _as_it_is,
            *(_without(f"{head}.") for head in heads),
            *(_with(f"{top}.") for top in self._tops),
            *(_in_diffusers(f"{head}.") for head in heads),
            *(_by(pattern, by) for pattern, by in RENAMES),
        ]


def _join(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module.replace('.', '_')}.{parameter}"


def _by_joined_name(stored: Iterable[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name in stored:
        found[_join(name)].append(name)
    return dict(found)


def _as_it_is(name: str) -> str:
    return name


def _without(prefix: str) -> _Rename:
    return lambda name: name.removeprefix(prefix)


def _in_diffusers(prefix: str) -> _Rename:
    return lambda name: diffusers_name(name.removeprefix(prefix))


def _with(prefix: str) -> _Rename:
    return lambda name: prefix + name


def _by(pattern: str, by: str) -> _Rename:
    return lambda name: re.sub(pattern, by, name)
