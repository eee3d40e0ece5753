"""Every variant that PEFT has, on each kind of model: one table, with what PEFT itself refuses.

What each can be asked for beside that is in test_merge_peft.py, test_variants_peft.py and test_neighbours_peft.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging import done, surgery
from neighbours import PIXELS, convolutions, same_parameters
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from tiny import Base, outputs
from torch import Tensor

from lorasurgery.dialects import peft as dialect
from lorasurgery.dialects._peft_types_refused import REFUSED
from lorasurgery.model import open_model
from lorasurgery.targets import completed

Bases = Callable[..., Base]
Make = Callable[..., Any]
Loaded = Callable[[str], tuple[Base, Any]]

# a square weight and another; of GPT-2 both are transformers' Conv1D; of the network a kernel of 1 and one of 3 x 3
TARGETS = {
    "llama": ["q_proj", "up_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "bert": ["query", "intermediate.dense"],
    "t5": ["q", "wi"],
    "mixtral": ["q_proj", "k_proj"],
    "convolutions": ["point", "square"],
}
BLOCKS = {"oft_block_size": 4}
WAVES = {"n_frequency": 50, "scaling": 300.0}
SPARSE = {"sparsity": 0.9}
PLAIN = {"r": 3, "lora_alpha": 5}
# alpha != rank wherever there are both
ROWS: Mapping[str, tuple[Make, dict[str, Any]]] = {
    "LoRA": (LoraConfig, PLAIN),
    "rsLoRA": (LoraConfig, {**PLAIN, "use_rslora": True}),
    "LoRA, B with a bias": (LoraConfig, {**PLAIN, "lora_bias": True}),
    "DoRA": (LoraConfig, {**PLAIN, "use_dora": True}),
    "PiSSA": (LoraConfig, {**PLAIN, "init_lora_weights": "pissa"}),
    "OLoRA": (LoraConfig, {**PLAIN, "init_lora_weights": "olora"}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "lora_alpha": 5, "total_step": 9}),
    "VeRA": (peft.VeraConfig, {"r": 7}),
    "LoHa": (peft.LoHaConfig, {"r": 3, "alpha": 5}),
    "LoKr": (peft.LoKrConfig, {"r": 2, "alpha": 5}),
    "OFT": (peft.OFTConfig, BLOCKS),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}),
    "HRA": (peft.HRAConfig, {"r": 4}),
    "FourierFT": (peft.FourierFTConfig, WAVES),
    "MiSS": (peft.MissConfig, {"r": 4}),
    "SHiRA": (peft.ShiraConfig, {"r": 4, "random_seed": 3}),
    "HiRA": (peft.HiraConfig, {"r": 4}),
    "C3A": (peft.C3AConfig, {"block_size": 16}),
    "DeLoRA": (peft.DeloraConfig, {"r": 4}),
    "GraLoRA": (peft.GraloraConfig, {"r": 4, "alpha": 6, "gralora_k": 2}),
    "WaveFT": (peft.WaveFTConfig, WAVES),
    "VB-LoRA": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 20, "vector_length": 16}),
    "PSOFT": (peft.PsoftConfig, {"r": 4, "psoft_alpha": 4}),
    "PEANuT": (peft.PeanutConfig, {"r": 4}),
    "OSF": (peft.OSFConfig, {}),
    "DEFT": (peft.DeftConfig, {"r": 4}),
    "RoAd": (peft.RoadConfig, {"group_size": 8, "variant": "road_2"}),
    "GLoRA": (peft.GloraConfig, {"r": 3}),
    "BEFT": (peft.BeftConfig, {}),
    "Super-Tuning": (peft.SupertuningConfig, SPARSE),
    "Supra": (peft.SupertuningConfig, {**SPARSE, **PLAIN}),
    "RandLoRA": (peft.RandLoraConfig, {"r": 4}),
    "PVeRA": (peft.PveraConfig, {"r": 4}),
    "Uni-LoRA": (peft.UniLoraConfig, {"r": 3, "theta_d_length": 50}),
    "TinyLoRA": (peft.TinyLoraConfig, {"r": 2, "u": 5}),
    "FRoD": (peft.FrodConfig, {"progressbar": False}),
    "norms": (peft.LNTuningConfig, {}),
    "tokens": (peft.TrainableTokensConfig, {"token_indices": [5, 71]}),
}  # fmt: skip
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "shared",
             "mixtral": "embed_tokens", "convolutions": "point"}  # fmt: skip

NO_CONV1D = [
    "MiSS", "SHiRA", "C3A", "DeLoRA", "PSOFT", "PEANuT", "RoAd", "GLoRA", "Super-Tuning", "Supra",
    "LoHa", "LoKr", "OFT", "BOFT", "HRA",
]  # fmt: skip
NO_CONV2D = [
    "PiSSA", "OLoRA", "VeRA", "FourierFT", "MiSS", "SHiRA", "C3A", "DeLoRA", "GraLoRA", "WaveFT",
    "VB-LoRA", "PSOFT", "PEANuT", "DEFT", "RoAd", "GLoRA", "Super-Tuning", "Supra", "RandLoRA",
    "PVeRA", "Uni-LoRA", "TinyLoRA", "FRoD", "tokens",
]  # fmt: skip
# where PEFT has no layer for it, or none that it can merge, and says so; OLoRA multiplies a Conv1D's factors wrongly
PEFT_REFUSES = {
    *((name, "gpt2") for name in [*NO_CONV1D, "OLoRA"]),
    *((name, "convolutions") for name in NO_CONV2D),
    *(("BEFT", kind) for kind in TARGETS if kind != "bert"),
    *(("LoRA, B with a bias", kind) for kind in ("llama", "t5", "mixtral")),
}
# where PEFT adapts nothing, without a word
PEFT_IGNORES = {("OSF", "gpt2"), ("OSF", "convolutions")}
# where PEFT's running layer computes something else than the weight that it merges, which is ours
PEFT_DIFFERS = {("OFT", "convolutions")}
CELLS = [(name, kind) for name in ROWS for kind in TARGETS]


@pytest.fixture(scope="module")
def loaded(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A base, and its model, which is copied and never changed."""
    network = convolutions(tmp_path_factory.mktemp("convolutions") / "base")

    @cache
    def one(kind: str) -> tuple[Base, Any]:
        base = network if kind == "convolutions" else bases(f"{kind}, short")
        return base, base.load()

    return one


def computed(model: Any) -> Tensor:
    if hasattr(model, "square"):
        with torch.inference_mode():
            found: Tensor = model(PIXELS)
            return found
    return outputs(model)


def made(model: Any, cell: tuple[str, str], path: Path) -> Path:
    """Let PEFT make an adapter, move all that it would train by chance, and save it."""
    name, kind = cell
    make, settings = ROWS[name]
    targets = [EMBEDDING[kind]] if name == "tokens" else TARGETS[kind]
    more = {"fan_in_fan_out": True} if kind == "gpt2" and make is LoraConfig else {}
    torch.manual_seed(1)
    adapted = get_peft_model(deepcopy(model), make(target_modules=targets, **settings, **more))
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    adapted.save_pretrained(path)
    return path


def beside(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(deepcopy(model), adapter).eval()


@pytest.mark.parametrize("cell", sorted(set(CELLS) - PEFT_REFUSES - PEFT_IGNORES), ids=", ".join)
def test_what_is_merged_and_what_is_written_computes_what_pefts_layers_do(
    loaded: Loaded, tmp_path: Path, cell: tuple[str, str]
) -> None:
    base, model = loaded(cell[1])
    adapter = made(model, cell, tmp_path / "adapter")
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    running, found = beside(model, adapter), base.load(tmp_path / "merged")
    wanted = computed(running)
    assert (wanted - computed(model)).abs().max() > 1e-4
    # singular vectors and Q of PiSSA and OLoRA differ between libraries by more than a rounding
    same_parameters(found, deepcopy(running).merge_and_unload(), 1e-5)
    same = torch.allclose(computed(found), wanted, rtol=1e-4, atol=2e-5)
    assert same is (cell not in PEFT_DIFFERS)
    ours = tmp_path / "ours"
    ours.mkdir()
    dialect.write(completed(open_model(base.path), dialect.read(adapter)), ours)
    torch.testing.assert_close(computed(beside(model, ours)), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cell", sorted(PEFT_REFUSES), ids=", ".join)
def test_what_peft_has_no_layer_for_it_refuses(
    loaded: Loaded, tmp_path: Path, cell: tuple[str, str]
) -> None:
    _, model = loaded(cell[1])
    with pytest.raises((TypeError, ValueError, RuntimeError, KeyError, AttributeError)):
        beside(model, made(model, cell, tmp_path / "adapter")).merge_and_unload()


@pytest.mark.parametrize("cell", sorted(PEFT_IGNORES), ids=", ".join)
def test_what_peft_adapts_nothing_of_is_one_error_here(
    loaded: Loaded, tmp_path: Path, cell: tuple[str, str]
) -> None:
    base, model = loaded(cell[1])
    adapter = made(model, cell, tmp_path / "adapter")
    assert torch.equal(computed(beside(model, adapter)), computed(model))
    result = surgery("merge", base.path, adapter, "-o", tmp_path / "merged")
    assert (result.exit_code, result.stderr) == (
        2, f"error: {base.path}: nothing is left of the adapter to merge.\n",
    )  # fmt: skip


def test_every_type_of_peft_that_a_weight_can_hold_has_a_row() -> None:
    rows = {make(**settings).peft_type.value for make, settings in ROWS.values()}
    assert rows == {kind.value for kind in PeftType} - set(REFUSED)
