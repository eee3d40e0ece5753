"""kohya's module names: a prefix for the part of the pipeline, and the path with `_` for `.`.

Which `_` was a `.` only a model's own names tell (naming.py compares them so); until then a module is
called by its part, a dot, and the joined path: `unet.down_blocks_0_attentions_1_proj_in`. kohya's files of SDXL have
Stability's names, `unet.input_blocks_2_1_proj_in`, and keep them here; naming.py knows both (unet_names.py).
"""

from __future__ import annotations

from collections.abc import Collection

# in the order in which they are tried; LyCORIS' own prefix is for models that are no pipeline's part
_PARTS = (
    ("lora_unet_", "unet"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"), ("lora_te_", "text_encoder"),
    ("lora_transformer_", "transformer"), ("lycoris_", ""),
)  # fmt: skip
PREFIXES = tuple(prefix for prefix, _ in _PARTS)
FIRST = "lora_te1_"  # of a text encoder that has others beside it


def module_of(name: str) -> str | None:
    """`unet.mid_block_proj` of `lora_unet_mid_block_proj`; None if no prefix is known."""
    for prefix, part in _PARTS:
        if name.startswith(prefix) and name != prefix:
            path = name.removeprefix(prefix)
            return f"{part}.{path}" if part else path
    return None


def name_of(module: str, *, first: bool) -> str:
    """What kohya calls a module; `first`: its only text encoder is called the first of several."""
    part, _, path = module.partition(".")
    prefix = next((p for p, known in _PARTS if known == part and path), None)
    if prefix is None:
        prefix, path = "lycoris_", module
    elif part == "text_encoder":
        prefix = FIRST if first else "lora_te_"
    return prefix + path.replace(".", "_")


def has_several_encoders(modules: Collection[str]) -> bool:
    """Whether a second or third text encoder is among them."""
    return any(m.startswith(("text_encoder_2.", "text_encoder_3.")) for m in modules)
