"""diffusers' keys, in all spellings that say which layer they mean, and the config in the metadata.

unet.mid.attn.to_q.lora_A.weight                       since PEFT is its backend
unet.mid.attn.to_q.lora.down.weight                    of the unet, before that
text_encoder.h.q_proj.lora_linear_layer.down.weight    of text encoders, before that
unet.mid.attn.processor.to_q_lora.down.weight          first of all: an attention's q, k, v and out
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.errors import FormatError

METADATA = "lora_adapter_metadata"
PARTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
    "controlnet", "prior",
)  # fmt: skip

_ENDS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias",
    "lora.down.weight": "A", "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A", "lora_linear_layer.up.weight": "B",
    "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m", "alpha": "alpha",
}  # fmt: skip
_KEY = re.compile(rf"(?P<module>.+?)\.(?P<end>{'|'.join(map(re.escape, _ENDS))})")
_FIRST = re.compile(
    r"(?P<owner>.+?)(\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<way>down|up)\.weight"
)


@dataclass(frozen=True, slots=True)
class Key:
    """Whose factor a tensor is; role: A, B, m, bias or alpha."""

    part: str
    module: str
    role: str


def parse(name: str, *, alone: bool) -> Key | None:
    """None for what is no key of diffusers'; `alone`: the file may be of one model, without parts."""
    part, _, rest = name.partition(".")
    if part not in PARTS:
        if not alone:
            return None
        part, rest = "", name
    if match := _FIRST.fullmatch(rest):
        return Key(part, _attention(part, match), "A" if match["way"] == "down" else "B")
    match = _KEY.fullmatch(rest)
    return Key(part, match["module"], _ENDS[match["end"]]) if match else None


def _attention(part: str, match: re.Match[str]) -> str:
    """The layer of an attention: text encoders are transformers' and name theirs otherwise."""
    owner, which = match["owner"], match["which"]
    if part.startswith("text_encoder"):
        return f"{owner}.{which}_proj"
    return f"{owner}.to_out.0" if which == "out" else f"{owner}.to_{which}"


def configs(source: Checkpoint) -> Mapping[str, Mapping[str, Any]]:
    """Part -> PEFT's config, the part '' for a model's own file; {} without metadata."""
    text = source.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise FormatError(f"{source.path}: {METADATA} is no JSON object. Restore the file.")
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in facts.items():
        part, _, field = name.partition(".")
        if part in PARTS and field:
            found[part][field] = value
        else:
            found[""][name] = value
    if "" in found and len(found) > 1:
        raise FormatError(
            f"{source.path}: {METADATA} has fields of {', '.join(sorted(filter(None, found)))} and of no "
            f"part ({min(found[''])}). Restore the file."
        )
    return dict(found)


def part_of(module: str) -> tuple[str, str]:
    """The part and the path below it; ('', module) for what is below none."""
    part, _, rest = module.partition(".")
    return (part, rest) if part in PARTS and rest else ("", module)
