"""What PEFT's LoRA can be asked for, case by case, with the parameters that must and must not change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An adapter that PEFT makes, and a word on what is adapted: enough to see that it was."""

    name: str
    kind: str
    config: dict[str, Any]
    changes: tuple[str, ...] = field(default=())
    keeps: tuple[str, ...] = field(default=())


ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
Q0, Q1, V0, V1 = (
    f"model.layers.{i}.self_attn.{n}_proj.weight"
    for n, i in (("q", 0), ("q", 1), ("v", 0), ("v", 1))
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EXPERTS = "model.layers.0.mlp.experts."

LLAMA = [
    Case("one module", "llama", {"target_modules": ["q_proj"]}, (Q0, Q1), (V0,)),
    Case("all linear", "llama", {"target_modules": "all-linear"}, (Q0, V1), (HEAD, EMBEDDING)),
    Case("a regex", "llama",
         {"target_modules": r"model\.layers\.\d\.(self_attn\.[qv]_proj|mlp\.up_proj)"}, (Q0, V1)),
    Case("full paths", "llama", {"target_modules": [Q0.removesuffix(".weight")]}, (Q0,), (Q1,)),
    Case("ranks by pattern", "llama",
         {"target_modules": "all-linear",
          "rank_pattern": {"q_proj": 7, r"layers\.1\..*v_proj": 2, "^model.layers.0.mlp.up_proj": 6,
                           "k_proj|o_proj": 4, "proj": 9}}, (Q0, V1)),
    Case("alphas by pattern", "llama",
         {"target_modules": "all-linear",
          "alpha_pattern": {"q_proj": 7, "model.layers.1.self_attn.v_proj": 0.75, ".*down_proj": 16,
                            "layers.0": 100}}, (Q0, V1)),
    Case("two patterns that both fit", "llama",
         {"target_modules": ["q_proj", "v_proj"],
          "alpha_pattern": {r"layers\.0\..*": 11, "q_proj": 2, ".*": 5}}, (Q0, V1)),
    Case("an alpha that is no whole number", "llama",
         {"target_modules": ["q_proj"], "lora_alpha": 2.6}, (Q0,)),
    Case("rsLoRA", "llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, (Q0,)),
    Case("rsLoRA with patterns", "llama",
         {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 5},
          "alpha_pattern": {"v_proj": 9}}, (Q0, V0)),
    Case("one layer by number", "llama",
         {"target_modules": ["q_proj"], "layers_to_transform": 1}, (Q1,), (Q0,)),
    Case("layers by number and pattern", "llama",
         {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0],
          "layers_pattern": ["layers"]}, (Q0, V0), (Q1,)),
    Case("excluded by name", "llama",
         {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
         (Q1, V0), (Q0,)),
    Case("excluded by regex", "llama",
         {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}, (Q0,), (Q1,)),
    Case("embedding and head", "llama",
         {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, (EMBEDDING, HEAD, Q0)),
    Case("a whole head", "llama",
         {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, (HEAD, Q0), (EMBEDDING,)),
    Case("a whole embedding", "llama",
         {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, (EMBEDDING,), (HEAD,)),
    Case("whole modules of several tensors", "llama",
         {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "input_layernorm"]},
         ("model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight")),
    Case("a matrix as a parameter", "llama",
         {"target_modules": [], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]}, (Q0,)),
    Case("an orthogonal start", "llama",
         {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}, (Q0,)),
    Case("all biases", "llama-biased", {"target_modules": ["q_proj"], "bias": "all"},
         ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias")),
    Case("biases of what is adapted", "llama-biased",
         {"target_modules": ["q_proj"], "bias": "lora_only"},
         ("model.layers.0.self_attn.q_proj.bias",), ("model.layers.1.mlp.up_proj.bias",)),
    Case("B with a bias", "llama-biased", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
         ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias")),
    Case("B with a bias, rsLoRA", "llama-biased",
         {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True},
         ("model.layers.0.self_attn.q_proj.bias",)),
    Case("B with a bias, beside trained biases", "llama-biased",
         {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"},
         ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias")),
    Case("a sharded base", "llama-sharded", {"target_modules": "all-linear"}, (Q0, V1)),
    Case("a sharded base, and a whole head", "llama-sharded",
         {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, (HEAD, Q0)),
]  # fmt: skip

H0 = "transformer.h.0."
GPT2 = [
    Case("Conv1D", "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True},
         (f"{H0}attn.c_attn.weight",)),
    Case("Conv1D, square", "gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
         (f"{H0}attn.c_proj.weight",)),
    Case("Conv1D, all of them", "gpt2", {"target_modules": "all-linear"}, (f"{H0}mlp.c_fc.weight",)),
    # PEFT decides by the layer's type, and saves the flag of whichever layer came last: false here
    Case("Conv1D, square, and a flag that says otherwise", "gpt2",
         {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True},
         (f"{H0}attn.c_proj.weight", "transformer.wte.weight")),
    Case("Conv1D with biases", "gpt2",
         {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
         (f"{H0}attn.c_attn.bias", f"{H0}ln_1.bias")),
    Case("Conv1D with B's bias", "gpt2",
         {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True},
         (f"{H0}attn.c_attn.bias",)),
    Case("positions as an embedding", "gpt2", {"target_modules": ["wpe", "c_attn"]},
         ("transformer.wpe.weight",), ("transformer.wte.weight",)),
    Case("Conv1D as a parameter", "gpt2",
         {"target_modules": [], "target_parameters": ["attn.c_attn.weight", "attn.c_proj.weight"]},
         (f"{H0}attn.c_attn.weight", f"{H0}attn.c_proj.weight")),
    Case("names without their prefix", "gpt2-headless",
         {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
         (f"{H0}attn.c_proj.weight",)),
]  # fmt: skip

B0 = "encoder.layer.0."
BERT = [
    Case("an encoder", "bert", {"target_modules": ["query", "value"]},
         (f"{B0}attention.self.query.weight",)),
    Case("an encoder, all of it", "bert", {"target_modules": "all-linear", "bias": "all"},
         (f"{B0}intermediate.dense.weight", "pooler.dense.weight", "embeddings.LayerNorm.bias")),
    Case("its embeddings", "bert", {"target_modules": ["word_embeddings", "query"]},
         ("embeddings.word_embeddings.weight",)),
    Case("a classifier", "bert-classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"},
         ("classifier.weight", "classifier.bias", f"bert.{B0}attention.self.query.weight")),
    Case("a classifier and all biases", "bert-classifier",
         {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
         ("classifier.bias", "bert.pooler.dense.bias")),
]  # fmt: skip

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACK = {"target_modules": [], "target_parameters": BOTH}
MOE = [
    Case("both stacks of experts", "mixtral", STACK,
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj")),
    Case("what leads into the experts", "mixtral", STACK | {"target_parameters": BOTH[:1]},
         (f"{EXPERTS}gate_up_proj",), (f"{EXPERTS}down_proj",)),
    Case("what leads out of the experts", "mixtral", STACK | {"target_parameters": BOTH[1:]},
         (f"{EXPERTS}down_proj",), (f"{EXPERTS}gate_up_proj",)),
    Case("experts, router and attention", "mixtral",
         {"target_modules": ["q_proj"], "target_parameters": [*BOTH, "gate.weight"]},
         (f"{EXPERTS}gate_up_proj", "model.layers.0.mlp.gate.weight", Q0)),
    Case("experts with patterns and rsLoRA", "mixtral",
         STACK | {"use_rslora": True, "rank_pattern": {"experts.down_proj": 2, "gate_up_proj": 5},
                  "alpha_pattern": {r".*\.down_proj": 7.5}},
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj")),
    Case("experts that are stored as a stack", "mixtral-fused", STACK,
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj")),
    Case("experts under other names", "qwen3-moe", STACK,
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj")),
    # names of transformers 4: PEFT makes target_parameters of them, and of gate and up one of twice the rank
    Case("experts by their old names", "mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]},
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj", Q0)),
    Case("experts by their usual names", "qwen3-moe",
         {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                             "down_proj"]},
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj", Q0)),
    Case("experts that are turned", "gpt-oss", STACK,
         (f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj")),
    Case("experts that are turned, and their biases", "gpt-oss",
         STACK | {"target_parameters": [*BOTH, *(f"{name}_bias" for name in BOTH)]},
         (f"{EXPERTS}gate_up_proj_bias", f"{EXPERTS}down_proj", f"{EXPERTS}down_proj_bias")),
]  # fmt: skip

VISION = [
    Case("language and vision", "llava",
         {"target_modules": r".*(language_model.*q_proj|vision_tower.*v_proj|linear_1)"},
         ("model.language_model.layers.0.self_attn.q_proj.weight",
          "model.vision_tower.encoder.layers.0.self_attn.v_proj.weight",
          "model.multi_modal_projector.linear_1.weight"), (HEAD,)),
    Case("a convolution", "llava", {"target_modules": ["patch_embedding", "q_proj"]},
         ("model.vision_tower.embeddings.patch_embedding.weight",)),
    Case("a head whose name moved", "llava",
         {"target_modules": ["lm_head"], "modules_to_save": ["multi_modal_projector"]},
         (HEAD, "model.multi_modal_projector.linear_2.bias")),
    Case("language and vision", "qwen2-vl", {"target_modules": "all-linear"},
         ("model.language_model.layers.0.self_attn.q_proj.weight",
          "model.visual.blocks.0.attn.qkv.weight")),
]  # fmt: skip

CASES = [*LLAMA, *GPT2, *BERT, *MOE, *VISION]
