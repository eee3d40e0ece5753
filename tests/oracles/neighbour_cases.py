"""What PEFT's neighbours of LoRA can be asked for, on each kind of model that they have layers for."""

from __future__ import annotations

from neighbours import Case
from peft import (
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    WaveFTConfig,
)

Q0, UP1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
Q0_BIAS = "model.layers.0.self_attn.q_proj.bias"
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

TWO = ["q_proj", "up_proj"]
OFT = [
    Case("OFT by the number of blocks", "llama", OFTConfig(r=4, oft_block_size=0, target_modules=TWO),
         (Q0, UP1)),
    Case("OFT by the size of blocks, exactly", "llama",
         OFTConfig(oft_block_size=8, target_modules=TWO, use_cayley_neumann=False), (Q0, UP1)),
    Case("OFT with one block for all", "llama",
         OFTConfig(oft_block_size=8, target_modules=TWO, block_share=True), (Q0, UP1)),
    *(Case(f"OFT of {n} terms", "llama",
           OFTConfig(oft_block_size=4, target_modules=TWO, num_cayley_neumann_terms=n), (Q0, UP1))
      for n in (2, 3, 4, 6)),
    Case("OFT, held near", "llama",
         OFTConfig(oft_block_size=8, target_modules=TWO, coft=True, eps=0.5), (Q0, UP1)),
    Case("OFT and biases", "llama-biased",
         OFTConfig(oft_block_size=8, target_modules=TWO, bias="oft_only"),
         (Q0, "model.layers.0.self_attn.q_proj.bias")),
    Case("OFT of an embedding", "llama",
         OFTConfig(oft_block_size=8, target_modules=["embed_tokens", "q_proj"]),
         ("model.embed_tokens.weight", Q0)),
    Case("OFT", "gpt2", OFTConfig(oft_block_size=8, target_modules=["lm_head"]),
         ("transformer.wte.weight",)),
    Case("OFT", "bert", OFTConfig(oft_block_size=8, target_modules=["query", "dense"]), (QUERY,)),
    Case("OFT", "t5", OFTConfig(oft_block_size=8, target_modules=["q", "wi"]), (T5_Q, T5_WI)),
    Case("OFT", "convolutions", OFTConfig(r=2, oft_block_size=0, target_modules=["point", "square"]),
         ("point.weight", "square.weight")),
]  # fmt: skip

IA3 = [
    Case("IA3", "llama",
         IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
         ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight")),
    Case("IA3 with biases", "llama-biased",
         IA3Config(target_modules=["k_proj", "o_proj", "down_proj"], feedforward_modules=["down_proj"],
                   modules_to_save=["lm_head"]),
         ("model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.o_proj.weight",
          "model.layers.1.mlp.down_proj.weight", "lm_head.weight")),
    Case("IA3 of Conv1D", "gpt2",
         IA3Config(target_modules=["c_attn", "mlp.c_proj", "attn.c_proj"],
                   feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
         ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias",
          "transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight")),
    Case("IA3 by a regex", "bert",
         IA3Config(target_modules=["query", "output.dense"],
                   feedforward_modules=r".*\.\d+\.output\.dense"),
         (QUERY, "encoder.layer.1.output.dense.weight")),
    Case("IA3", "t5", IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
         ("encoder.block.0.layer.0.SelfAttention.k.weight",
          "decoder.block.1.layer.2.DenseReluDense.wo.weight")),
    Case("IA3", "convolutions",
         IA3Config(target_modules=["point", "square", "grouped", "head"],
                   feedforward_modules=["square", "head"]),
         ("point.weight", "point.bias", "square.weight", "grouped.weight", "head.weight")),
]  # fmt: skip

# adapters that were saved without path_initial_model_for_weight_conversion
STARTED = [
    Case(f"{start}, not converted", kind,
         LoraConfig(r=3, lora_alpha=5, init_lora_weights=start, target_modules=modules, **more), changes)
    for start, kind, modules, more, changes in [
        ("pissa", "llama", ["q_proj", "up_proj", "down_proj"], {}, (Q0, UP1)),
        ("olora", "llama", ["q_proj", "up_proj", "down_proj"], {}, (Q0, UP1)),
        ("pissa", "llama", ["q_proj", "embed_tokens"],
         {"use_rslora": True, "rank_pattern": {"q_proj": 5}}, (Q0, "model.embed_tokens.weight")),
        ("pissa", "gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True},
         ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight")),
        ("pissa", "bert", ["query", "dense"], {}, (QUERY,)),
        ("olora", "bert", ["query", "dense"], {"use_rslora": True}, (QUERY,)),
        ("pissa", "t5", ["q", "wi"], {}, (T5_Q, T5_WI)),
        ("olora", "t5", ["q", "wi"], {}, (T5_Q, T5_WI)),
    ]
]  # fmt: skip

# types that PEFT's own layers merge
OTHERS = [
    Case("BOFT", "llama-biased", BOFTConfig(boft_block_size=4, target_modules=TWO), (Q0, UP1)),
    Case("HRA", "llama-biased", HRAConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("FourierFT", "llama",
         FourierFTConfig(n_frequency=50, scaling=300.0, target_modules=TWO), (Q0, UP1)),
    Case("MiSS", "llama-biased", MissConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("SHiRA", "llama-biased", ShiraConfig(r=4, target_modules=TWO, random_seed=3), (Q0, UP1)),
    Case("HiRA", "llama", HiraConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("C3A", "llama-biased", C3AConfig(block_size=16, target_modules=TWO), (Q0, UP1)),
    Case("DeLoRA", "llama-biased", DeloraConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("GraLoRA", "llama", GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=TWO), (Q0, UP1)),
    Case("WaveFT", "llama", WaveFTConfig(n_frequency=50, scaling=300.0, target_modules=TWO), (Q0, UP1)),
    Case("VB-LoRA", "llama",
         VBLoRAConfig(r=2, num_vectors=20, vector_length=16, topk=2, target_modules=["q_proj", "up_proj"]),
         (Q0, UP1)),
    Case("PSOFT", "llama-biased", PsoftConfig(r=4, psoft_alpha=4, target_modules=TWO), (Q0, UP1)),
    Case("PEANuT", "llama-biased", PeanutConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("OSF", "llama-biased", OSFConfig(target_modules=TWO), (Q0, UP1)),
    Case("DEFT", "llama-biased", DeftConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("RoAd", "llama-biased", RoadConfig(group_size=8, variant="road_2", target_modules=TWO),
         (Q0, UP1, Q0_BIAS)),
    Case("RoAd without biases", "llama", RoadConfig(group_size=8, target_modules=TWO), (Q0, UP1)),
    Case("GLoRA", "llama-biased", GloraConfig(r=3, target_modules=TWO), (Q0, UP1, Q0_BIAS)),
    Case("GLoRA by vectors", "llama",
         GloraConfig(r=3, target_modules=TWO, config_A_B="vector", config_C="none"), (Q0, UP1)),
    Case("BEFT", "llama-biased", BeftConfig(target_modules=TWO), (Q0_BIAS,)),
    Case("Super-Tuning", "llama-biased",
         SupertuningConfig(target_modules=TWO, sparsity=0.9), (Q0, UP1)),
    Case("Supra", "llama", SupertuningConfig(target_modules=TWO, sparsity=0.9, r=3, lora_alpha=5),
         (Q0, UP1)),
    Case("RandLoRA", "llama-biased", RandLoraConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("RandLoRA, drawn", "llama",
         RandLoraConfig(r=5, target_modules=TWO, sparse=True, save_projection=False), (Q0, UP1)),
    Case("RandLoRA of Conv1D, drawn", "gpt2",
         RandLoraConfig(r=5, target_modules=["c_attn", "mlp.c_proj"], save_projection=False),
         ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight")),
    Case("PVeRA", "llama-biased", PveraConfig(r=4, target_modules=TWO), (Q0, UP1)),
    Case("PVeRA, drawn", "llama", PveraConfig(r=4, target_modules=TWO, save_projection=False),
         (Q0, UP1)),
    Case("Uni-LoRA", "llama-biased",
         UniLoraConfig(r=3, theta_d_length=50, target_modules=TWO, save_indices=True), (Q0, UP1)),
    Case("Uni-LoRA, drawn", "llama", UniLoraConfig(r=3, theta_d_length=50, target_modules=TWO),
         (Q0, UP1)),
    Case("Uni-LoRA of Conv1D, drawn", "gpt2",
         UniLoraConfig(r=3, theta_d_length=50, target_modules=["c_attn", "mlp.c_proj"]),
         ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight")),
    Case("TinyLoRA", "llama-biased", TinyLoraConfig(r=2, u=5, target_modules=TWO), (Q0, UP1)),
    Case("TinyLoRA in two groups, drawn", "llama",
         TinyLoraConfig(r=2, u=5, target_modules=TWO, weight_tying=0.5, save_projection=False),
         (Q0, UP1)),
    Case("FRoD", "llama-biased", FrodConfig(target_modules=TWO, progressbar=False), (Q0, UP1)),
    Case("norms", "llama", LNTuningConfig(target_modules=["input_layernorm", "norm"]),
         ("model.layers.0.input_layernorm.weight", "model.norm.weight")),
    Case("norms", "bert", LNTuningConfig(target_modules=["LayerNorm"]),
         ("encoder.layer.0.output.LayerNorm.bias",)),
    Case("tokens", "llama", TrainableTokensConfig(token_indices=[3, 70]), ("model.embed_tokens.weight",)),
    Case("HiRA of Conv1D", "gpt2", HiraConfig(r=4, target_modules=["c_attn", "attn.c_proj"]),
         ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight")),
    Case("HRA", "bert", HRAConfig(r=4, target_modules=["query", "dense"]), (QUERY,)),
    Case("BOFT", "t5", BOFTConfig(boft_block_size=4, target_modules=["q", "wi"]), (T5_Q, T5_WI)),
]  # fmt: skip

CASES = [*LOHA, *LOKR, *OFT, *IA3, *STARTED, *OTHERS]
NF4 = [LOHA[0], LOKR[1], OFT[0], IA3[0], STARTED[0], OTHERS[1]]
