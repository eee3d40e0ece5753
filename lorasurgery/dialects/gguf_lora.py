"""llama.cpp's adapter: a GGUF file of type `adapter`, two tensors for each of the base's.

`blk.0.attn_q.weight.lora_a` [r, in] and `.lora_b` [out, r]; of token_embd a [tokens, r] and b [dim, r]. One
adapter.lora.alpha for all, and alpha / r of each b as its scale; an alpha of 0 is no scale. The rows of B lie
as the base's do: those of llama's q and k in llama.cpp's order, for which the numbers of heads are needed.
llama.cpp's converter does not write them; ours does, and else they come from a config.json beside the file.
https://github.com/ggml-org/llama.cpp: src/llama-adapter.cpp, convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import read_json
from lorasurgery.dialects import _gguf_lora_write, _one_file
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.formats import _gguf_names as names
from lorasurgery.formats.gguf import File
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("lora",)

_ENDS = {".lora_a": "a", ".lora_b": "b"}
_EMBEDDING = "token_embd.weight"


def detect(path: Path) -> bool:
    """One .gguf file whose general.type is adapter."""
    file = _one_file.find(path, ".gguf")
    return file is not None and File(file).values.get("general.type") == "adapter"


def read(path: Path) -> Adapter:
    """The adapter's sites under Hugging Face's names; the header alone is read until a site loads."""
    source = _one_file.opened(path, ".gguf")
    assert isinstance(source, File)
    _check(source)
    config = _config(source)
    sites: list[Site] = []
    problems = []
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for key in source:
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None:
            info = source.info(key)
            problems.append(
                Problem(
                    key,
                    f"{key} {list(info.shape)} is no lora_a or lora_b, and llama.cpp ignores it",
                )
            )
        else:
            pairs[key.removesuffix(end)][_ENDS[end]] = key
    for tensor, keys in pairs.items():
        found = _site(source, config, tensor, keys)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sites.append(found)
    return Adapter(
        path=path,
        dialect="gguf_lora",
        base=source.metadata.get("general.base_model.0.name"),
        sites=tuple(sites),
        replaced={},
        added={},
        load=_one_file.nothing,
        load_added=_one_file.nothing,
        problems=tuple(problems),
        base_config=config,
    )


def write(adapter: Adapter, folder: Path) -> None:
    """adapter.gguf; scales that one alpha cannot say are baked into B.

    Raises FormatError without the base's config, and for what llama.cpp cannot hold.
    """
    _gguf_lora_write.write(adapter, folder / "adapter.gguf")


def _check(source: File) -> None:
    """Raise for an adapter that is no LoRA, and for an architecture whose names are not known."""
    kind = source.values.get("adapter.type")
    if kind != "lora":
        raise MatchError(
            f"{source.path}: adapter.type is {kind!r}, and 'lora' is read. Use llama.cpp for it."
        )
    if "adapter.alora.invocation_tokens" in source.values:
        raise MatchError(
            f"{source.path}: adapter.alora.invocation_tokens: it acts on some tokens alone, so no merged "
            "weight does the same. Use llama.cpp for it."
        )
    if source.architecture not in names.FAMILIES:
        raise FormatError(
            f"{source.path}: architecture {source.architecture!r} is not mapped to transformers' names. "
            f"Known: {', '.join(names.FAMILIES)}."
        )


def _config(source: File) -> Mapping[str, Any]:
    """Of the header what config.json says of heads, or the config.json beside the file."""
    at = f"{source.architecture}.attention.head_count"
    heads, kv = source.values.get(at), source.values.get(f"{at}_kv")
    if isinstance(heads, int) and heads > 0:
        kv = kv if isinstance(kv, int) and kv > 0 else heads
        return {
            "model_type": names.FAMILIES[source.architecture].model_type,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
        }
    beside = source.path.parent / "config.json"
    return read_json(beside) if beside.is_file() else {}


def _site(
    source: File, config: Mapping[str, Any], tensor: str, keys: Mapping[str, str]
) -> Site | Problem:
    family = names.FAMILIES[source.architecture]
    some = next(iter(keys.values()))
    name = names.hugging_face(tensor, family)
    if name is None:
        return Problem(some, f"{some}: {source.architecture} has no tensor {tensor}")
    if len(keys) < 2:
        return Problem(some, f"{some} stands alone: {tensor} needs lora_a and lora_b")
    a, b = source.info(keys["a"]).shape, source.info(keys["b"]).shape
    embedding = tensor == _EMBEDDING
    fit = len(a) == len(b) == 2 and (a[1] == b[1] if embedding else a[0] == b[1])
    if not fit:
        return Problem(some, f"{tensor}: lora_a {list(a)} and lora_b {list(b)} are no factors")
    rank = b[1]
    heads = None
    if role := names.paired_role(tensor, family):
        heads = names.heads_of(config, role)
        if heads is None or b[0] % (2 * heads):
            return Problem(
                some,
                f"{tensor}: the rows of its lora_b are in llama.cpp's order, and {_without(heads, b[0])}. "
                "Put the base's config.json beside the file",
            )
    module, _, parameter = name.rpartition(".")
    shapes = {"A": (b[1], b[0]), "B": a} if embedding else {"A": a, "B": b}
    roles = {"A": keys["b"], "B": keys["a"]} if embedding else {"A": keys["a"], "B": keys["b"]}
    facts = {role: TensorInfo(roles[role], "F32", shape) for role, shape in shapes.items()}
    layout = "embedding" if embedding else "linear"
    said = AdapterConfig("lora", rank, _alpha(source, rank))
    load = _reader(source, facts, heads, embedding=embedding)
    return Site(module, parameter, layout, said, facts, load)


def _without(heads: int | None, rows: int) -> str:
    return (
        "nothing says how many heads there are"
        if heads is None
        else f"{rows} are not {heads} heads"
    )


def _alpha(source: File, rank: int) -> float:
    alpha = source.values.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise FormatError(f"{source.path}: adapter.lora.alpha is {alpha!r}. Restore the file.")
    return float(alpha) or float(rank)


def _reader(
    source: File, facts: Mapping[str, TensorInfo], heads: int | None, *, embedding: bool
) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        import numpy as np

        found = {role: source.read(i.name).astype(np.float32) for role, i in facts.items()}
        if embedding:  # A is b turned
            found["A"] = found["A"].T.copy()
        if heads is not None:
            rows = len(found["B"])
            found["B"] = found["B"][names.paired_rows(0, rows, rows // heads)]
        return found

    return load
