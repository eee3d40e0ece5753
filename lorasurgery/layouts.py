"""How transformers' live modules differ from the checkpoints on disk: names, stacked experts, turned weights.

Checked against the conversion tables of transformers 5 in tests/oracles/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# live path -> stored path, tried when a module is not found under its own name; a `.` ends a prefix
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.visual\.", "visual."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^lm_head\.", "embed_out."),
    (r"^(model\.)?(encoder|decoder)\.embed_tokens\.", r"\1shared."),
    (r"\.mlp\.router\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.", ".block_sparse_moe."),
    (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
    (r"\.experts\.down_proj$", ".output_linear.weight"),
    (r"\.router\.weight$", ".router.layer.weight"),
)

# a stacked parameter [experts, out, in] -> the matrices that one expert's part is made of, row on row
EXPERTS = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
}

# model types whose linear weights are [in, out] (transformers' Conv1D), and the modules' last names
CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
}


def is_conv1d(config: Mapping[str, Any], weight: str) -> bool:
    """Whether transformers keeps this weight as [in, out]; bitsandbytes packs it as [out, in]."""
    module = weight.removesuffix(".weight").rpartition(".")[2]
    return module in CONV1D.get(str(config.get("model_type", "")), ())


# model types whose stacked experts are [experts, in, out]
TURNED_EXPERTS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")

# output heads and the embeddings that they share a tensor with when it is tied
HEADS = (
    "lm_head.weight", "lm_head.decoder.weight", "embed_out.weight", "proj_out.weight",
    "cls.predictions.decoder.weight",
)  # fmt: skip
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight",
    "embed_in.weight", "tokens_embed.weight",
)  # fmt: skip
