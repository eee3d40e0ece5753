"""Data files as records: text, prompt and completion, or a chat; each knows its file and line.

A .txt file is one text. A line of a .jsonl file is {"text"}, {"prompt", "completion"} or {"messages": [{"role",
"content"}]}, and {"text", "label"} for classification.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.errors import FormatError
from lorasurgery.model import HUB_ID

SUFFIXES = (".txt", ".jsonl")
_FORMS = "{text}, {prompt, completion}, {messages} or {text, label}"


@dataclass(frozen=True, slots=True)
class Record:
    """One example as it was written; `where` is file:line."""

    where: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    label: int | float | str | None = None


def files(text: str, flag: str = "--data") -> list[Path]:
    """A file, a directory's data files in the order of their names, or those of a data set on the hub.

    Raises FormatError where there is none.
    """
    path = Path(text)
    if not path.exists() and HUB_ID.fullmatch(text):
        path = _from_hub(text)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FormatError(f"{path}: no such file or directory. Check the path of {flag}.")
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise FormatError(
            f"{path}: no {' or '.join(SUFFIXES)} file in it. Check the path of {flag}."
        )
    return found


def _from_hub(text: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = text.partition("@")
    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return Path(
            snapshot_download(
                name, repo_type="dataset", revision=revision or None, allow_patterns=patterns
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(
            f"{text}: no such path, and the hub does not give such a data set ({reason}). Check the name."
        ) from None


def read(path: Path) -> Iterator[Record]:
    """A file's records. Raises FormatError, with the line, for what is none."""
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: no UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    if text.strip():
        yield Record(str(path), text=text)


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(f"{path}:{number}", line)


def _record(where: str, line: bytes) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: no JSON ({error}). Mend the line.") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: a {type(value).__name__}, where a record is wanted: {_FORMS}. Mend the line."
        )
    if isinstance(value.get("messages"), list) and value["messages"]:
        return Record(where, messages=tuple(_message(where, m) for m in value["messages"]))
    if all(isinstance(value.get(k), str) for k in ("prompt", "completion")):
        return Record(where, prompt=value["prompt"], completion=value["completion"])
    if isinstance(value.get("text"), str):
        return Record(where, text=value["text"], label=value.get("label"))
    raise FormatError(
        f"{where}: has {', '.join(map(repr, value)) or 'nothing'}, where {_FORMS} is wanted. Mend the line."
    )


def _message(where: str, message: Any) -> Mapping[str, Any]:
    if isinstance(message, dict) and all(
        isinstance(message.get(k), str) for k in ("role", "content")
    ):
        return message
    raise FormatError(
        f"{where}: a message is {message!r}, where a role and a content are wanted. Mend the line."
    )
