"""How a byte-level vocabulary cuts text before merging, by the names in tokenizer.ggml.pre.

The expressions are the ones published in the tokenizer.json of each family's models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"(?i:{_SHORT})|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"(?i:{_SHORT})|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+(?i:{_SHORT})?|{_BEFORE}{_UPPER}+{_LOWER}*(?i:{_SHORT})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True)
class Split:
    """What comes before the byte-level step, and how that step behaves."""

    first: tuple[dict[str, Any], ...] = ()
    use_regex: bool = False  # GPT-2's own expression, which the byte-level step holds
    composes: bool = False  # Unicode NFC comes first
    whole_words: bool = False  # a word in the vocabulary is taken without merging


def _by(pattern: str) -> tuple[dict[str, Any], ...]:
    kind = {"type": "Split", "behavior": "Isolated", "invert": False}
    return ({**kind, "pattern": {"Regex": pattern}},)


_GPT2_SPLIT = Split(use_regex=True)
_DIGITS_SPLIT = Split(first=({"type": "Digits", "individual_digits": True},), use_regex=True)
_LLAMA3_SPLIT = Split(first=_by(_LLAMA3), whole_words=True)
_QWEN2_SPLIT = Split(first=_by(_QWEN2), composes=True)

SPLITS = {
    "default": _GPT2_SPLIT, "gpt-2": _GPT2_SPLIT, "phi-2": _GPT2_SPLIT, "olmo": _GPT2_SPLIT,
    "smollm": _DIGITS_SPLIT, "starcoder": _DIGITS_SPLIT, "refact": _DIGITS_SPLIT,
    "codeshell": _DIGITS_SPLIT,
    "llama3": _LLAMA3_SPLIT, "llama-v3": _LLAMA3_SPLIT, "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT, "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": Split(first=_by(_TEKKEN), whole_words=True),
    "gpt-4o": Split(first=_by(_GPT4O)),
}  # fmt: skip

# their tokenizers put BOS before a text, and older headers do not say so
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")
