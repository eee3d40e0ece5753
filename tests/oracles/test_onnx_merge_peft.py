"""Adapters of PEFT's merged into a graph, whatever they change: the graph computes what PEFT's merged model does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as h
import onnxruntime
import pytest
import torch
from merging import done, surgery
from peft import (
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    GloraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn

ROWS, SIZES = 11, (16, 24, 20)
TWO = ["up", "down"]


class Block(nn.Module):
    """A lookup, two products with biases, and one without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, middle, last = SIZES
        self.table = nn.Embedding(ROWS, first)
        self.up, self.down = nn.Linear(first, middle), nn.Linear(middle, last)
        self.head = nn.Linear(last, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(self.table(ids))))))


def graph(path: Path) -> Path:
    """The block as exporters write it: a bias added after a MatMul, and one in a Gemm; names are lost."""
    held = {n: p.detach().numpy() for n, p in Block().named_parameters()}
    stored = {
        "table.weight": held["table.weight"], "onnx::MatMul_9": held["up.weight"].T.copy(),
        "onnx::Add_3": held["up.bias"], "down.weight": held["down.weight"],
        "onnx::C": held["down.bias"], "head.weight": held["head.weight"],
    }  # fmt: skip
    nodes = [
        h.make_node("Gather", ["table.weight", "ids"], ["e"], "/table/Gather"),
        h.make_node("MatMul", ["e", "onnx::MatMul_9"], ["u"], "/up/MatMul"),
        h.make_node("Add", ["onnx::Add_3", "u"], ["v"], "/up/Add"),
        h.make_node("Tanh", ["v"], ["t"], "/Tanh"),
        h.make_node("Gemm", ["t", "down.weight", "onnx::C"], ["d"], "/down/Gemm", transB=1),
        h.make_node("Tanh", ["d"], ["s"], "/Tanh_1"),
        h.make_node("Transpose", ["head.weight"], ["w"], "/head/Transpose", perm=[1, 0]),
        h.make_node("MatMul", ["s", "w"], ["y"], "/head/MatMul"),
    ]
    ends = [h.make_tensor_value_info("ids", 7, ["n"]), h.make_tensor_value_info("y", 1, ["n", 3])]
    tensors = [onnx.numpy_helper.from_array(t, n) for n, t in stored.items()]
    whole = h.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    onnx.save(h.make_model(whole, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


def computed(path: Path) -> np.ndarray:
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(ROWS)})[0]


def trained(folder: Path, config: Any) -> Path:
    """An adapter all of whose numbers have moved."""
    adapted = get_peft_model(Block(), config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def wanted(folder: Path) -> np.ndarray:
    merged = PeftModel.from_pretrained(Block(), folder).merge_and_unload()
    with torch.no_grad():
        return merged.eval()(torch.arange(ROWS)).numpy()


CONFIGS: dict[str, Any] = {
    "dora": LoraConfig(r=3, lora_alpha=7, target_modules=TWO, use_dora=True),
    "biases": LoraConfig(r=3, lora_alpha=7, target_modules=TWO, bias="all"),
    "own biases": LoraConfig(r=3, lora_alpha=7, target_modules=TWO, lora_bias=True),
    "whole modules": LoraConfig(r=3, lora_alpha=7, target_modules=TWO, modules_to_save=["head"]),
    "a lookup": LoraConfig(r=3, lora_alpha=7, target_modules=["table", "up"]),
    "rslora": LoraConfig(r=3, lora_alpha=7, target_modules=TWO, use_rslora=True),
    "loha": LoHaConfig(r=3, alpha=7, target_modules=TWO),
    "lokr": LoKrConfig(r=3, alpha=7, target_modules=TWO),
    "vera": VeraConfig(r=3, target_modules=["up"]),
    "ia3": IA3Config(target_modules=TWO, feedforward_modules=["down"]),
    "fourierft": FourierFTConfig(n_frequency=9, target_modules=TWO),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=TWO),
    "boft": BOFTConfig(boft_block_size=4, target_modules=TWO),
    "hra": HRAConfig(r=2, target_modules=TWO),
    "miss": MissConfig(r=4, target_modules=TWO),
    "shira": ShiraConfig(r=4, target_modules=TWO, random_seed=3),
    "c3a": C3AConfig(block_size=4, target_modules=TWO),
    "delora": DeloraConfig(r=4, target_modules=TWO),
    "randlora": RandLoraConfig(r=4, target_modules=TWO),
    "glora": GloraConfig(r=3, target_modules=TWO),
    "road": RoadConfig(group_size=8, variant="road_2", target_modules=["up"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_of_adapter_merges_as_peft_merges_it_and_comes_back(
    tmp_path: Path, kind: str
) -> None:
    base, adapter = graph(tmp_path / "m.onnx"), trained(tmp_path / "a", CONFIGS[kind])
    out, undo, back = (tmp_path / name for name in ("o.onnx", "u", "b.onnx"))
    done("merge", base, adapter, "-o", out, "--undo", undo)
    want = wanted(adapter)
    assert np.abs(want - computed(base)).max() > 0.02
    np.testing.assert_allclose(computed(out), want, rtol=0, atol=3e-6)
    assert "verdict    holds" in done("verify", out, "--base", base, "-a", adapter).stdout
    assert surgery("verify", base, "--base", base, "-a", adapter).exit_code == 3
    done("unmerge", out, adapter, "-o", back, "--undo", undo)
    assert back.read_bytes() == base.read_bytes()


def test_a_bias_that_two_modules_share_becomes_one_of_its_own(tmp_path: Path) -> None:
    """Exporters store equal tensors once: biases that are zero."""
    square = np.linspace(-1, 1, 36, dtype=np.float32).reshape(6, 6)
    weights = {"one.weight": square, "two.weight": 0.5 * square.T.copy(), "zero": np.zeros(6, "f4")}
    nodes = [
        h.make_node("Gemm", ["x", "one.weight", "zero"], ["a"], "/one/Gemm", transB=1),
        h.make_node("Identity", ["zero"], ["again"], "Identity_0"),
        h.make_node("Gemm", ["a", "two.weight", "again"], ["y"], "/two/Gemm", transB=1),
    ]
    ends = [h.make_tensor_value_info(n, 1, ["n", 6]) for n in "xy"]
    tensors = [onnx.numpy_helper.from_array(t, n) for n, t in weights.items()]
    whole = h.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    base = tmp_path / "m.onnx"
    onnx.save(h.make_model(whole, opset_imports=[h.make_opsetid("", 17)], ir_version=8), base)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    adapted = get_peft_model(Two(), LoraConfig(r=2, target_modules=["one"], bias="lora_only"))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "a")
    layer = adapted.base_model.model.one
    change = layer.get_delta_weight("default").detach().numpy()
    bias = layer.base_layer.bias.detach().numpy()
    out, undo, back = (tmp_path / name for name in ("o.onnx", "u", "b.onnx"))
    shown = done("merge", base, tmp_path / "a", "-o", out, "--undo", undo)
    assert "note: one: shared zero, and has a bias of its own now." in shown.stderr.splitlines()
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("f4")
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    want = (x @ (square + change).T + bias) @ weights["two.weight"].T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], want, rtol=1e-5, atol=1e-5)
    assert "verdict    holds" in done("verify", out, "--base", base, "-a", tmp_path / "a").stdout
    done("unmerge", out, tmp_path / "a", "-o", back, "--undo", undo)
    assert back.read_bytes() == base.read_bytes()


# --- errors


def refused(*arguments: object) -> str:
    result = surgery(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def test_what_subtraction_cannot_bring_back_is_refused_without_the_undo_file(
    tmp_path: Path,
) -> None:
    base, out = graph(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    dora = trained(tmp_path / "dora", CONFIGS["dora"])
    one = (
        re.escape(f"error: {dora}: ")
        + r"(up|down)\.weight: what dora adds depends on the weight: only "
    )
    more = (
        r"the undo file brings back the base's \(1 more like it: (up|down)\.weight\)\. Mend it, or "
    )
    last = r"leave it out with --allow-unmatched '(up|down)\.weight'\.\n"
    assert re.fullmatch(one + more + last, refused("unmerge", base, dora, "-o", out))
    whole = trained(tmp_path / "whole", CONFIGS["whole modules"])
    assert refused("unmerge", base, whole, "-o", out) == (
        f"error: {whole}: head.weight was replaced as a whole: only the undo file brings back the base's. "
        "Mend it, or leave it out with --allow-unmatched 'head.weight'.\n"
    )
    assert not out.exists()


def test_a_whole_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    class Other(Block):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(SIZES[2], 4, bias=False)

    adapted = get_peft_model(Other(), CONFIGS["whole modules"])
    adapted.save_pretrained(tmp_path / "a")
    out = tmp_path / "o.onnx"
    assert refused("merge", graph(tmp_path / "m.onnx"), tmp_path / "a", "-o", out) == (
        f"error: {tmp_path / 'a'}: head.weight: the adapter replaces it by [4, 20], but the graph has "
        "[3, 20]. Mend it, or leave it out with --allow-unmatched 'head.weight'.\n"
    )
    assert not out.exists()
