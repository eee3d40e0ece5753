"""Variants: the formulas of the LoRA family as pure functions. One file is one variant."""
