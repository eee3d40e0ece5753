"""What `select` has found: each module's importance, and which are to have factors of their own, as a file.

    {"format": "lorasurgery-importance", "version": 1, "base": "org/model", "method": "lora-drop", "threshold": 0.9,
     "over": "group", "modules": [{"module": "model.layers.0.self_attn.q_proj", "group": "q_proj.576x576",
     "output2": 0.21, "importance": 0.013, "share": 0.2, "kept": true}, ...]}

output2 is E||s B A x||², importance its part of the sum over all modules, share that over the group or over all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasurgery.errors import FormatError, OutputError
from lorasurgery.place import writing

FORMAT, VERSION = "lorasurgery-importance", 1


@dataclass(frozen=True, slots=True)
class Weighed:
    """One module."""

    module: str
    group: str
    output2: float
    importance: float
    share: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """All modules, and how they were chosen among."""

    modules: tuple[Weighed, ...]
    said: Mapping[str, Any]

    @property
    def keep(self) -> set[str]:
        return {one.module for one in self.modules if one.kept}

    @property
    def weighed(self) -> set[str]:
        return {one.module for one in self.modules}

    @classmethod
    def read(cls, path: Path) -> Kept:
        """Raises FormatError for a file that `select` has not written."""
        try:
            content = json.loads(path.read_bytes())
            kind = content.pop("format"), content.pop("version")
            modules = tuple(Weighed(**entry) for entry in content.pop("modules"))
        except OSError as error:
            raise FormatError(f"{path}: {error.strerror}. Check the path of --keep.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _strange(path) from None
        if kind != (FORMAT, VERSION):
            raise _strange(path)
        return cls(modules, content)

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        content = {
            "format": FORMAT, "version": VERSION, **self.said,
            "modules": [asdict(one) for one in self.modules],
        }  # fmt: skip
        part = path.with_name(path.name + ".part")
        with writing(path, "what was selected"):
            try:
                part.write_text(json.dumps(content, indent=1) + "\n")
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError for a file that is there, or a directory that is not."""
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: its directory does not exist. Make it first.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path}: is there already. Pass --overwrite, or name another file.")


def _strange(path: Path) -> FormatError:
    return FormatError(
        f"{path}: is nothing that `lorasurgery select` has written. Check the path of --keep."
    )
