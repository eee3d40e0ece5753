"""A GGUF vocabulary as tokenizer.json: byte-level BPE (`gpt2`) and sentencepiece BPE (`llama`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lorasurgery.formats import _gguf_split
from lorasurgery.formats._gguf_missing import MissingError

if TYPE_CHECKING:
    from lorasurgery.formats.gguf import File

Facts = dict[str, Any]

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def files(file: File) -> dict[str, Facts]:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json; MissingError if not known."""
    kind = file.values.get("tokenizer.ggml.model")
    tokens = cast("list[str] | None", file.array("tokenizer.ggml.tokens"))
    if kind not in ("gpt2", "llama") or not tokens:
        raise MissingError(
            f"tokenizer.json is not written: a vocabulary of kind {kind!r} is not read. Take the "
            "file from the original model."
        )
    roles = _roles(file, tokens)
    added = _added(file, tokens, set(roles.values()))
    parts = _byte_level(file, tokens, added) if kind == "gpt2" else _pieces(file, tokens, roles)
    tokenizer: Facts = {"version": "1.0", "truncation": None, "padding": None}
    tokenizer |= {"added_tokens": added} | parts
    if affixes := _affixes(file, kind == "llama", roles):
        tokenizer["post_processor"] = _template(*affixes, tokens)
    config: Facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.values.get(f"{file.architecture}.context_length", 10**30),
    }
    config |= roles
    if "tokenizer.chat_template" in file.values:
        config["chat_template"] = file.values["tokenizer.chat_template"]
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "special_tokens_map.json": roles,
    }


def _roles(file: File, tokens: list[str]) -> dict[str, str]:
    roles = {}
    for role, key in _ROLES.items():
        at = file.values.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(at, int) and 0 <= at < len(tokens):
            roles[role] = tokens[at]
    return roles


def _added(file: File, tokens: list[str], roles: set[str]) -> list[Facts]:
    """Tokens that are found in the text before it is split."""
    kinds = file.array("tokenizer.ggml.token_type") or [1] * len(tokens)
    return [
        {
            "id": at, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != USER_DEFINED,
        }
        for at, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED) or token in roles
    ]  # fmt: skip


def _byte_level(file: File, tokens: list[str], added: list[Facts]) -> Facts:
    """The parts of GPT-2's kind of tokenizer."""
    name = str(file.values.get("tokenizer.ggml.pre", "default"))
    split = _gguf_split.SPLITS.get(name)
    merges = file.array("tokenizer.ggml.merges")
    if split is None or merges is None:
        reason = f"pre-tokenizer {name!r} is not known" if split is None else "it holds no merges"
        raise MissingError(
            f"tokenizer.json is not written: {reason}. Take the file from the original model."
        )
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": split.use_regex}
    return {
        "normalizer": {"type": "NFC"} if split.composes else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*split.first, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": {"type": "ByteLevel", **byte_level},
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": split.whole_words,
            "vocab": {token: at for at, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip


def _pieces(file: File, tokens: list[str], roles: dict[str, str]) -> Facts:
    """The parts of a sentencepiece BPE: spaces are U+2581, unknown characters fall to bytes."""
    prefix = bool(file.values.get("tokenizer.ggml.add_space_prefix", True))
    spaces: Facts = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer: Facts | None = None
    before: Facts | None = {
        "type": "Metaspace", "replacement": "\u2581", "split": False,
        "prepend_scheme": "first" if prefix else "never",
    }  # fmt: skip
    if file.architecture == "phi3":  # keeps a leading space beside the one put before the text
        first = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
        normalizer, before = {"type": "Sequence", "normalizers": [*first, spaces]}, None
    decoders: list[Facts] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": normalizer,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": roles.get("unk_token"),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: at for at, token in enumerate(tokens)},
            "merges": file.array("tokenizer.ggml.merges") or _merges(file, tokens),
        },
    }  # fmt: skip


def _merges(file: File, tokens: list[str]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the best-scored piece first."""
    scores = cast("list[float]", file.array("tokenizer.ggml.scores") or [])
    if len(scores) != len(tokens):
        raise MissingError(
            f"tokenizer.json is not written: {len(scores)} scores for {len(tokens)} pieces, and no "
            "merges. Take the file from the original model."
        )
    at = {token: place for place, token in enumerate(tokens)}
    found = []
    for token, score in dict(zip(tokens, scores, strict=True)).items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(at[left], at[right]) for left, right in pairs if left in at and right in at]
        found += [(score, tokens[left], tokens[right]) for left, right in sorted(known)]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _affixes(file: File, pieces: bool, roles: dict[str, str]) -> tuple[list[str], list[str]] | None:
    """Tokens put before and after a text, or None if there are none."""
    default = pieces or str(file.values.get("tokenizer.ggml.pre")) in _gguf_split.BOS_BY_DEFAULT
    before = file.values.get("tokenizer.ggml.add_bos_token", default)
    after = file.values.get("tokenizer.ggml.add_eos_token", False)
    begin = [roles["bos_token"]] if before and "bos_token" in roles else []
    end = [roles["eos_token"]] if after and "eos_token" in roles else []
    return (begin, end) if begin or end else None


def _template(begin: list[str], end: list[str], tokens: list[str]) -> Facts:
    """Special tokens around the text, and around each of two."""

    def around(name: str, kind: int) -> list[Facts]:
        before, after = (
            [{"SpecialToken": {"id": t, "type_id": kind}} for t in ts] for ts in (begin, end)
        )
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in (*begin, *end)
        },
    }
