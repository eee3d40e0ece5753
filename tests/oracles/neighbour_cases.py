"""What PEFT's neighbours of LoRA can be asked for, on each kind of model that they have layers for."""

from __future__ import annotations

from neighbours import Case
from peft import LoHaConfig, LoKrConfig

Q0, UP1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"
T5_Q, T5_WI = (
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    ("decoder.block.1.layer.2.DenseReluDense.wi.weight"),
)
CONV = ["point", "square", "grouped", "line", "head"]
CONVS = tuple(f"{name}.weight" for name in CONV)

LOHA = [
    Case("LoHa", "llama", LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]), (Q0, UP1)),
    Case("LoHa, patterns and a whole head", "llama",
         LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"],
                    rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*up_proj": 7}),
         (Q0, UP1, "lm_head.weight")),
    Case("LoHa", "gpt2", LoHaConfig(r=2, alpha=5, target_modules=["lm_head"]),
         ("transformer.wte.weight",)),
    Case("LoHa", "bert", LoHaConfig(r=3, alpha=5, target_modules=["query", "dense"]), (QUERY,)),
    Case("LoHa", "t5", LoHaConfig(r=3, alpha=5, target_modules=["q", "wi"]), (T5_Q, T5_WI)),
    Case("LoHa, flat", "convolutions", LoHaConfig(r=3, alpha=5, target_modules=CONV), CONVS),
    Case("LoHa with cores", "convolutions",
         LoHaConfig(r=3, alpha=5, target_modules=CONV, use_effective_conv2d=True), CONVS),
]  # fmt: skip

LOKR = [
    Case("LoKr, both whole or one of them", "llama",
         LoKrConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]), (Q0, UP1)),
    Case("LoKr, split into 2 and the rest", "llama",
         LoKrConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"], decompose_factor=2,
                    rank_pattern={"up_proj": 9}, alpha_pattern={"up_proj": 4}), (Q0, UP1)),
    Case("LoKr, both factored", "llama",
         LoKrConfig(r=2, alpha=5, target_modules=["q_proj", "up_proj"], decompose_both=True), (Q0, UP1)),
    Case("LoKr", "bert", LoKrConfig(r=2, alpha=5, target_modules=["query", "dense"]), (QUERY,)),
    Case("LoKr", "gpt2", LoKrConfig(r=2, alpha=5, target_modules=["lm_head"]),
         ("transformer.wte.weight",)),
    Case("LoKr", "t5", LoKrConfig(r=2, alpha=5, target_modules=["q", "wi"]), (T5_Q, T5_WI)),
    Case("LoKr, whole", "convolutions", LoKrConfig(r=8, alpha=5, target_modules=CONV), CONVS),
    Case("LoKr, flat", "convolutions", LoKrConfig(r=2, alpha=5, target_modules=CONV), CONVS),
    Case("LoKr with cores", "convolutions",
         LoKrConfig(r=2, alpha=5, target_modules=CONV, use_effective_conv2d=True), CONVS),
]  # fmt: skip

CASES = [*LOHA, *LOKR]
NF4 = [LOHA[0], LOKR[1]]
