"""PEFT's types that no merged weight computes, each with the reason and with what to do instead."""

from __future__ import annotations

_PROMPT = "puts vectors of its own before the tokens, and changes no weight. Load it with PEFT beside the base"
_ROUTED = "so that no merged weight does the same. Load it with PEFT beside the base"

REFUSED = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": "puts keys and values of its own before the tokens', and changes no weight. Load it with "
    "PEFT beside the base",
    "CARTRIDGE": "is a cache of keys and values, and changes no weight. Load it with PEFT beside the base",
    "ADAPTION_PROMPT": "adds attention to a prompt of its own behind a gate, and changes no weight. Load it "
    "with PEFT beside the base",
    "XLORA": f"weighs several LoRA for each token, {_ROUTED}, or merge one of its adapters",
    "LILY": f"has a router that mixes its B's by the batch, {_ROUTED}",
    "POLY": f"mixes its skills by the task's id, {_ROUTED}",
    "SHADOW": f"runs a small network beside each block, {_ROUTED}",
    "ADAMSS": "orders its rows by clusters of the base's that scikit-learn must find again. Merge it with PEFT "
    "itself, where it was trained",
}  # fmt: skip
