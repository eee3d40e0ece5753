"""tokenizer.json as a GGUF vocabulary: the inverse of _gguf_tokenizer, byte-level and sentencepiece BPE.

llama.cpp knows how a byte-level vocabulary cuts text by a name alone. The name is found by comparing what
tokenizer.json does before merging with what each name stands for (_gguf_split): a tokenizer that does
anything else is refused, not written as something near.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasurgery.errors import FormatError
from lorasurgery.formats import _gguf_split
from lorasurgery.formats._gguf_write import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NAMES = ("smollm", "llama-bpe", "qwen2", "gpt-2", "tekken", "gpt-4o")
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Files:
    """What a directory says of its tokenizer, parsed; `size` is the embedding's number of rows."""

    where: str
    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]  # tokenizer_config.json
    config: Mapping[str, Any]
    size: int


def values(files: Files) -> dict[str, Value]:
    """All keys of tokenizer.*. Raises FormatError for a kind that llama.cpp is not known to do."""
    model = files.tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise _strange(files, f"model {model.get('type')!r}")
    pieces = bool(model.get("byte_fallback"))
    tokens = _tokens(files, model)
    ids = _ids(files, {token: at for at, token in enumerate(tokens)})
    found: dict[str, Value] = {}
    if pieces:
        found["tokenizer.ggml.model"] = "llama"
        found["tokenizer.ggml.add_space_prefix"] = _space_prefix(files)
        found["tokenizer.ggml.scores"] = _scores(model, tokens)
    else:
        found["tokenizer.ggml.model"] = "gpt2"
        found["tokenizer.ggml.pre"] = _pre(files)
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(model)]
    found["tokenizer.ggml.tokens"] = list(tokens)
    found["tokenizer.ggml.token_type"] = _types(files, tokens, ids.get("unknown"), pieces)
    found |= {f"tokenizer.ggml.{key}_token_id": at for key, at in ids.items()}
    found |= _affixes(files, ids)
    template = files.settings.get("chat_template")
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _strange(files: Files, what: str) -> FormatError:
    return FormatError(
        f"{files.where}: tokenizer.json has {what}, for which GGUF has no name. Export --to onnx."
    )


def _tokens(files: Files, model: Mapping[str, Any]) -> list[str]:
    """Tokens in the order of their numbers; the embedding's rows behind them are named as unused."""
    found = {int(at): token for token, at in dict(model.get("vocab") or {}).items()}
    found |= {int(one["id"]): str(one["content"]) for one in _added(files)}
    if not found or max(found) >= files.size:
        raise FormatError(
            f"{files.where}: tokenizer.json has token {max(found, default=None)}, and the embedding "
            f"{files.size} rows. Are the two of one model?"
        )
    return [found.get(at, f"[PAD{at}]") for at in range(files.size)]


def _added(files: Files) -> list[dict[str, Any]]:
    return list(files.tokenizer.get("added_tokens") or [])


def _types(files: Files, tokens: list[str], unknown: int | None, pieces: bool) -> list[int]:
    known = set(dict(files.tokenizer["model"]["vocab"]).values())
    kinds = [_NORMAL if at in known else _UNUSED for at in range(len(tokens))]
    if pieces:
        kinds = [
            _BYTE if _BYTE_TOKEN.fullmatch(t) else k for t, k in zip(tokens, kinds, strict=True)
        ]
    for one in _added(files):
        kinds[int(one["id"])] = _CONTROL if one.get("special") else _USER
    if pieces and unknown is not None:
        kinds[unknown] = _UNKNOWN
    return kinds


def _ids(files: Files, at: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for role, key in _IDS.items():
        token = files.settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        number = at.get(token) if isinstance(token, str) else None
        said = files.config.get(f"{role}_id")
        said = said[0] if isinstance(said, list) and said else said
        chosen = said if number is None else number
        if isinstance(chosen, int) and 0 <= chosen < files.size:
            found[key] = chosen
    return found


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Both generations of tokenizer.json: "a b", and ["a", "b"]."""
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []]
    return [(str(left), str(right)) for left, right in pairs]


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """llama.cpp merges the best-scored piece first: the order of the merges, as numbers."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    last = len(ranks)
    return [-float(ranks.get(token, last)) for token in tokens]


def _space_prefix(files: Files) -> bool:
    """Whether a space is put before a text; raises for what is no sentencepiece."""
    before, normalizer = files.tokenizer.get("pre_tokenizer"), files.tokenizer.get("normalizer")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = {"type": "Prepend", "prepend": _SPACE}
    steps = (normalizer or {}).get("normalizers", [normalizer])
    if before is None and steps in ([prepends, replaces], [replaces]):
        return len(steps) == 2
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if normalizer is None and before and metaspace.items() <= before.items():
        return bool(before.get("prepend_scheme") != "never")
    raise _strange(files, "sentencepiece with steps of its own before it")


def _pre(files: Files) -> str:
    """The name that stands for what is done before merging."""
    normalizer = files.tokenizer.get("normalizer")
    before = files.tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    *first, last = steps or [{}]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    for name in _NAMES if plain else ():
        split = _gguf_split.SPLITS[name]
        composed = {"type": "NFC"} if split.composes else None
        same = normalizer == composed and first == list(split.first)
        if same and split.use_regex == last.get("use_regex", True):
            return name
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise _strange(files, f"a pre-tokenizer ({kinds})")


def _affixes(files: Files, ids: Mapping[str, int]) -> dict[str, Value]:
    """Whether the text is put between BOS and EOS; raises where it is put between others."""
    post = files.tokenizer.get("post_processor") or {}
    steps = post.get("processors", [post])
    template = next((s for s in steps if s.get("type") == "TemplateProcessing"), None)
    single = template["single"] if template else []
    special = template["special_tokens"] if template else {}
    sides: tuple[list[int], list[int]] = ([], [])  # before the text, and behind it
    behind = False
    for part in single:
        if "SpecialToken" in part:
            sides[behind].extend(special[part["SpecialToken"]["id"]]["ids"])
        behind = behind or "Sequence" in part
    if sides[0] not in ([], [ids.get("bos")]) or sides[1] not in ([], [ids.get("eos")]):
        raise _strange(files, "tokens other than BOS and EOS around a text")
    found: dict[str, Value] = {}
    for key, side in zip(("bos", "eos"), sides, strict=True):
        said = files.settings.get(f"add_{key}_token")
        found[f"tokenizer.ggml.add_{key}_token"] = (
            said if isinstance(said, bool) and key in ids else bool(side)
        )
    return found
