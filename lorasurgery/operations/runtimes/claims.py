"""What each runtime does with what an adapter may hold: claims, each with what was read or run to make it, and when it holds.

A feature that a runtime is not listed with is unknown: nobody has looked. `versions` is what is known and no more: a
range from the change that made it so (owner/repository#number, or a release) to the last that was looked at; a commit
alone is the one state of a file that was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# silent: it is loaded, and computes something else; unknown is what no claim is made of
Verdict = Literal["ok", "rejected", "silent", "unknown"]


@dataclass(frozen=True, slots=True)
class Claim:
    """`by_scale`: only where the module is then scaled by another number than it was trained with."""

    verdict: Verdict
    why: str
    source: str
    versions: str
    by_scale: bool = False


@dataclass(frozen=True, slots=True)
class Runtime:
    """layouts: the dialects it reads, the one to write first; ranks: those it has room for, smallest first."""

    layouts: tuple[str, ...]
    claims: Mapping[str, Claim]
    ranks: tuple[int, ...] = ()
    # one alpha / r for all modules
    uniform: bool = False
    # whether it is known how it reads experts: one by one, but for models of these architectures stacked
    experts: bool = False
    stacks: tuple[str, ...] = ()

    def takes_stacks(self, config: Mapping[str, Any]) -> bool:
        """Whether a model of this config.json has its experts' factors stacked there."""
        return bool(set(config.get("architectures") or ()) & set(self.stacks))

    def claims_on(self, config: Mapping[str, Any]) -> Mapping[str, Claim]:
        """With what is otherwise for a model whose experts are stacked."""
        if not self.takes_stacks(config):
            return self.claims
        one, stack = self.claims[ONE_BY_ONE], self.claims[STACKED]
        why = "this model's class has is_3d_moe_weight"
        return {
            **self.claims,
            STACKED: Claim("ok", why, one.source, one.versions),
            ONE_BY_ONE: Claim("rejected", why, stack.source, stack.versions),
        }


ONE_BY_ONE, STACKED, SOME = "experts one by one", "stacked experts", "experts without factors"


_VLLM = "vllm/lora/peft_helper.py"
_VLLM_UTILS = "vllm/lora/utils.py"
_VLLM_RANKS = "vllm/config/lora.py"
_VLLM_EXPERTS = "vllm/lora/model_manager.py"
_VLLM_PACKED = "vllm/lora/lora_weights.py"
_SGLANG = "sglang/srt/lora/lora.py"
_SGLANG_CONFIG = "sglang/srt/lora/lora_config.py"
_LLAMA = "llama.cpp/convert_lora_to_gguf.py"
_LLAMA_RUN = "llama.cpp/src/llama-adapter.cpp"
_DIFFUSERS = "diffusers/loaders/lora_base.py"
_KOHYA = "sd-scripts/networks/lora.py"
_OLIVE = "Olive/olive/cli/convert_adapters.py"
_PEFT = "peft, run"
_LYCORIS = "lycoris-lora, run"
# the state of each that was read or run
_LAST = {
    _VLLM: "0214369", _VLLM_UTILS: "001e63a", _VLLM_RANKS: "01230b4", _VLLM_EXPERTS: "01533aa",
    _VLLM_PACKED: "0306474", _SGLANG: "002c60a", _SGLANG_CONFIG: "002c60a", _LLAMA: "0b03ada",
    _LLAMA_RUN: "0650ea8", _DIFFUSERS: "005627e", _KOHYA: "02298e3", _OLIVE: "ee6f40f",
    _PEFT: "0.21.2", _LYCORIS: "4.1.3",
}  # fmt: skip
# since when, where that is known; _GGUF: both its converter and its file are of that change
_EXPERTS_SINCE = "vllm-project/vllm#29222 (2025-11)"
_GGUF = "ggml-org/llama.cpp#8332 (2024-07)"
_ONE_SCALE = "it reads r and lora_alpha, and scales every module by the one alpha / r"
_NO_PAIR = "a tensor that is no lora_A or lora_B is an unsupported LoRA weight"
_UNEXPECTED = "its converter stops at a tensor that is no lora_A or lora_B"


def _range(source: str, since: str, until: str) -> str:
    last = until or _LAST[source]
    return f"{since} to {last}" if since else last


def _ok(why: str, source: str, since: str = "") -> Claim:
    return Claim("ok", why, source, _range(source, since, ""))


def _rejected(why: str, source: str, since: str = "", until: str = "") -> Claim:
    return Claim("rejected", why, source, _range(source, since, until))


def _silent(why: str, source: str, until: str = "", *, by_scale: bool = False) -> Claim:
    since = _GGUF if source == _LLAMA else ""
    return Claim("silent", why, source, _range(source, since, until), by_scale)


RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime(
        ("peft",),
        {
            "rsLoRA": _ok("use_rslora is read", _VLLM, "vllm-project/vllm#6909 (2024-12)"),
            "alpha_pattern": _silent(_ONE_SCALE, _VLLM, by_scale=True),
            "rank_pattern": _silent(_ONE_SCALE, _VLLM, by_scale=True),
            "DoRA": _rejected(
                "use_dora is refused", _VLLM, "vllm-project/vllm#6983 (2024-07)",
                "0214369; vllm-project/vllm#47395 would read it",
            ),
            "modules_to_save": _rejected("modules_to_save must be null", _VLLM),
            "IA3": _rejected(_NO_PAIR, _VLLM_UTILS),
            "other variants": _rejected(_NO_PAIR, _VLLM_UTILS),
            ONE_BY_ONE: _ok("a matrix for each expert is what most models' classes pack", _VLLM_EXPERTS, _EXPERTS_SINCE),
            STACKED: _rejected(
                "this model's class has no is_3d_moe_weight, and asserts a list of experts",
                _VLLM_EXPERTS, _EXPERTS_SINCE,
            ),
            SOME: _rejected("every expert's three matrices are asserted", _VLLM_PACKED),
            "rank": _rejected("max_lora_rank is at most 512", _VLLM_RANKS),
            "layout": _rejected("it reads a directory with adapter_config.json", _VLLM),
        },
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        uniform=True,
        experts=True,
        stacks=(
            "GptOssForCausalLM", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
            "Glm4MoeLiteForCausalLM", "InternS1ProForConditionalGeneration",
        ),
    ),
    "sglang": Runtime(
        ("peft",),
        {
            "rsLoRA": _silent(
                "it scales by lora_alpha / r whatever use_rslora says", _SGLANG,
                "sgl-project/sglang#40835 (2026-09)",
            ),
            "alpha_pattern": _silent(_ONE_SCALE, _SGLANG, by_scale=True),
            "rank_pattern": _silent(_ONE_SCALE, _SGLANG, by_scale=True),
            "IA3": _rejected("peft_type must be lora", _SGLANG),
            "other variants": _rejected("peft_type must be lora", _SGLANG),
            "layout": _rejected("it reads adapter_config.json", _SGLANG_CONFIG),
        },
        uniform=True,
    ),
    "llamacpp": Runtime(
        ("gguf_lora", "peft"),
        {
            "rsLoRA": _silent("it writes lora_alpha and scales by alpha / r", _LLAMA),
            "alpha_pattern": _silent("one alpha is written for all tensors", _LLAMA),
            "rank_pattern": _ok("each tensor is scaled by alpha / its own rank", _LLAMA_RUN, _GGUF),
            "DoRA": _rejected(_UNEXPECTED, _LLAMA),
            "IA3": _rejected(_UNEXPECTED, _LLAMA),
            "other variants": _rejected(_UNEXPECTED, _LLAMA),
            "modules_to_save": _rejected(_UNEXPECTED, _LLAMA),
            "bias": _rejected(_UNEXPECTED, _LLAMA),
            "lora_bias": _rejected(_UNEXPECTED, _LLAMA),
            "embeddings": _ok("A and B of token_embd are read turned", _LLAMA_RUN, "ggml-org/llama.cpp#11131 (2025-01)"),
            "tied head": _rejected("lm_head is ignored in a base that ties it", _LLAMA),
            "modules that the base lacks": _rejected("the base has no such tensor", _LLAMA_RUN),
            "layout": _rejected("its converter reads PEFT's, and it reads GGUF", _LLAMA),
        },
    ),
    "ort": Runtime(
        ("ort_adapter", "peft"),
        {
            "rsLoRA": _ok("Olive's convert-adapters bakes alpha / sqrt(r) in", _OLIVE),
            "alpha_pattern": _silent(f"Olive's convert-adapters: {_ONE_SCALE}", _OLIVE, by_scale=True),
            "rank_pattern": _silent(f"Olive's convert-adapters: {_ONE_SCALE}", _OLIVE, by_scale=True),
            "DoRA": _rejected("Olive's convert-adapters raises ValueError", _OLIVE),
        },
    ),
    "diffusers": Runtime(
        ("diffusers", "kohya"),
        {
            "rank_pattern": _ok("each module's rank is that of its lora_B", _DIFFUSERS),
            "alpha_pattern": _ok("alphas are read by module", _DIFFUSERS),
            "rsLoRA": _ok("use_rslora is read from the metadata", _DIFFUSERS),
            "DoRA": _ok("with peft 0.9 or newer beside it", _DIFFUSERS, "peft 0.9"),
            "convolutions": _ok("it builds PEFT's layers", _PEFT),
            "lora_bias": _ok("with peft 0.14 or newer beside it", _DIFFUSERS, "peft 0.14"),
        },
    ),
    "kohya": Runtime(
        ("kohya",),
        {
            "rsLoRA": _ok("each module's own alpha says it", _KOHYA),
            "alpha_pattern": _ok("each module has its own alpha", _KOHYA),
            "rank_pattern": _ok("each module is scaled by its own alpha / r", _KOHYA),
            "convolutions": _ok("lora_down has the kernel", _KOHYA),
            "DoRA": _ok("LyCORIS reads it", _LYCORIS),
            "IA3": _rejected("LyCORIS' loader gives it an argument too many", _LYCORIS),
            "other variants": _ok(
                "LyCORIS reads LoHa, LoKr, GLoRA, OFT of outputs and whole differences", _LYCORIS
            ),
        },
    ),
    "peft": Runtime(
        ("peft",),
        {
            **{
                feature: _ok("its own", _PEFT)
                for feature in (
                    "rsLoRA", "alpha_pattern", "rank_pattern", "DoRA", "modules_to_save", "bias",
                    "lora_bias", "embeddings", "target_parameters", "IA3", "other variants", "convolutions",
                    STACKED, ONE_BY_ONE, SOME,
                )
            },
            "layout": _rejected("it looks for adapter_config.json", _PEFT),
            "parts that are not understood": _silent(
                "keys that match nothing and fields that are unknown are loaded without an error", _PEFT
            ),
            "modules that the base lacks": _silent(
                "keys that match nothing are loaded without an error", _PEFT
            ),
        },
    ),
}  # fmt: skip
