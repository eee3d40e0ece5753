"""Files of the trainers' and runtimes' own libraries are read as those libraries mean them, and theirs read ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gguf import GGUFReader
from handmade import adapter, delta, lora
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from merging import make_adapter, merged_by_peft
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Base, tensors
from torch import Tensor, nn
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Variant
from lorasurgery.dialects import diffusers, gguf_lora, kohya, ort_adapter, peft


class Net(nn.Module):
    """A convolution and a linear layer, with `_` and `.` in their paths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 4, 1)])
        self.mid = nn.ModuleDict({"proj_out": nn.Linear(16, 20)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.down_blocks:
            x = block(x).tanh()
        found: Tensor = self.mid["proj_out"](x.flatten(2))
        return found


X = torch.linspace(-1, 1, 2 * 6 * 16).reshape(2, 6, 4, 4)
# LyCORIS' algorithm and its options, all scaled by something else than 1
CASES: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora with cores": {"algo": "lora", "use_tucker": True},
    "lora, rank-stabilized": {"algo": "lora", "rs_lora": True},
    "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "loha": {"algo": "loha"},
    "loha with cores": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr, both factored": {"algo": "lokr", "decompose_both": True},
    "lokr with cores": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "loha, decomposed by rows": {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    "loha with cores, decomposed by columns": {
        "algo": "loha", "use_tucker": True, "dora_wd": True, "wd_on_output": False,
    },
    "lokr, decomposed by columns": {
        "algo": "lokr", "factor": 2, "dora_wd": True, "wd_on_output": False,
    },
    "oft": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 2},
    "oft, held and rescaled": {"algo": "diag-oft", "constraint": 0.1, "rescaled": True},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3"},
    "ia3 of inputs": {"algo": "ia3", "train_on_input": True},
    "glora": {"algo": "glora"},
    "lokr, both whole": {"algo": "lokr", "factor": 2, "linear_dim": 64},
}  # fmt: skip


def trained(options: dict[str, Any]) -> tuple[Net, Any]:
    """The network with LyCORIS' modules in it, all of whose factors are moved away from zero."""
    LycorisNetwork.apply_preset({"target_module": ["Net"]})
    net = Net().eval()
    sizes = {
        "linear_dim": 2,
        "linear_alpha": 3.0,
        "conv_dim": options.get("linear_dim", 2),
        "conv_alpha": 3.0,
    }
    network = create_lycoris(net, 1.0, **{**sizes, **options})
    network.apply_to()
    for p in network.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return net, network.eval()


def merged(adapter: Adapter) -> Net:
    """A plain network whose weights took the adapter's changes in."""
    net = Net().eval()
    weights = dict(net.named_parameters())
    # of a joined name or of a path, below a part or not
    names = {name.removesuffix(".weight").replace(".", "_"): name for name in weights}
    assert adapter.sites
    for site in adapter.sites:
        w = weights[names[site.module.removeprefix("unet.").replace(".", "_")]]
        variant = cast(Variant, plugins.load("adapters", site.config.variant))
        flat = w.detach().numpy().reshape(len(w), -1)
        delta = variant.delta(flat, site.load(), site.config)
        w.data += torch.from_numpy(np.ascontiguousarray(delta)).reshape(w.shape)
    for name in adapter.added:
        module, _, parameter = name.rpartition(".")
        path = names[module.removeprefix("unet.").replace(".", "_")].removesuffix("weight")
        weights[path + parameter].data += torch.from_numpy(adapter.load_added(name))
    return net


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_lycoris_computes_what_its_network_does(tmp_path: Path, case: str) -> None:
    net, network = trained(CASES[case])
    file = tmp_path / "its.safetensors"
    network.save_weights(str(file), torch.float32, {})
    found = kohya.read(file)
    assert found.problems == ()
    assert len(found.sites) == 3
    with torch.inference_mode():
        wanted, got = net(X), merged(found)(X)
        assert (wanted - Net()(X)).abs().max() > 0.05  # or else there would be nothing to see
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# LyCORIS' loader fails on its own files: it takes the rank of a LoKr with cores from the wrong side, has
# magnitudes by rows alone, and gives IA3 an argument too many
_UNLOADABLE = ("lokr with cores", "decomposed by columns", "ia3")


@pytest.mark.parametrize("case", [c for c in CASES if not any(n in c for n in _UNLOADABLE)])
def test_lycoris_reads_what_was_written(tmp_path: Path, case: str) -> None:
    net, network = trained(CASES[case])
    network.save_weights(str(tmp_path / "its.safetensors"), torch.float32, {})
    (tmp_path / "ours").mkdir()
    kohya.write(kohya.read(tmp_path / "its.safetensors"), tmp_path / "ours")
    ours = tmp_path / "ours" / "lora.safetensors"
    plain = Net().eval()
    again, _ = create_lycoris_from_weights(1.0, str(ours), plain)
    again.apply_to()
    with torch.inference_mode():
        torch.testing.assert_close(plain(X), net(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in ("lora with cores", "lokr, both whole")]
)
def test_a_file_of_lycoris_is_written_as_it_was(tmp_path: Path, case: str) -> None:
    # but for what has no say: a core is folded into A, and the alpha of whole parts scales nothing
    _, network = trained(CASES[case])
    network.save_weights(str(tmp_path / "its.safetensors"), torch.float32, {})
    (tmp_path / "ours").mkdir()
    kohya.write(kohya.read(tmp_path / "its.safetensors"), tmp_path / "ours")
    theirs, ours = (
        load_file(p / f)
        for p, f in ((tmp_path, "its.safetensors"), (tmp_path / "ours", "lora.safetensors"))
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor)


def configured(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=2, lora_alpha=3, target_modules=["down_blocks.0", "down_blocks.1", "mid.proj_out"],
        rank_pattern={"mid.proj_out": 4}, alpha_pattern={"down_blocks.1": 5}, init_lora_weights=False,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_what_diffusers_writes_by_way_of_peft_computes_the_same(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    # diffusers' save_lora_weights: the state dict and the config of each part, each name after the part's
    config = configured(**options)
    net = inject_adapter_in_model(config, Net()).eval()
    for name, p in net.named_parameters():
        p.data += 0.3 * torch.randn(p.shape) if "magnitude" in name else 0
    wanted = net(X).detach()
    facts = {
        f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()
    }
    tensors = {f"unet.{k}": t for k, t in get_peft_model_state_dict(net).items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(facts, indent=2, sort_keys=True),
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata)
    found = diffusers.read(tmp_path)
    assert found.problems == ()
    with torch.inference_mode():
        assert (wanted - Net()(X)).abs().max() > 0.05
        torch.testing.assert_close(merged(found)(X), wanted, rtol=1e-5, atol=1e-5)
    # and what diffusers' load_lora_weights makes of ours: LoraConfig(**metadata), then the keys of the part
    (tmp_path / "ours").mkdir()
    diffusers.write(found, tmp_path / "ours")
    ours = tmp_path / "ours" / "pytorch_lora_weights.safetensors"
    with safe_open(ours, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    again = inject_adapter_in_model(
        LoraConfig(**{k.removeprefix("unet."): v for k, v in said.items()}), Net()
    ).eval()
    state = {k.removeprefix("unet."): t for k, t in load_file(ours).items()}
    loaded = set_peft_model_state_dict(again, state)
    assert not loaded.unexpected_keys
    torch.testing.assert_close(again(X).detach(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_q_and_k_lie_as_those_of_the_base_do(
    tmp_path: Path, bases: Callable[..., Base]
) -> None:
    # transformers' GGUF loader turns the rows of a base of llama.cpp's back: what llama.cpp adds to those,
    # turned back alike, is what PEFT's merge of the same adapter adds
    base = bases("llama")
    path = make_adapter(base, tmp_path / "peft", target_modules=["q_proj", "k_proj", "up_proj"])
    made = replace(peft.read(path), base_config=json.loads((base.path / "config.json").read_text()))
    (tmp_path / "gguf").mkdir()
    gguf_lora.write(made, tmp_path / "gguf")
    reader = GGUFReader(tmp_path / "gguf" / "adapter.gguf")
    found = {t.name: np.array(t.data) for t in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    wanted = merged_by_peft(base, (path, 1.0)).state_dict()
    was = tensors(base.path)
    config = made.base_config
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for ours, theirs, heads in (
            ("attn_q", "self_attn.q_proj", config["num_attention_heads"]),
            ("attn_k", "self_attn.k_proj", config["num_key_value_heads"]),
            ("ffn_up", "mlp.up_proj", None),
        ):
            a, b = (found[f"blk.{layer}.{ours}.weight.lora_{ab}"] for ab in "ab")
            name = f"{at}{theirs}.weight"
            change = np.float32(alpha / b.shape[1]) * b @ a
            if heads is not None:
                turn = LlamaTensorProcessor()._reverse_permute_weights
                change = turn(change, config["num_attention_heads"], heads)
            w = was[name] + torch.from_numpy(change)
            torch.testing.assert_close(w, wanted[name], rtol=1e-5, atol=1e-6)


def test_a_session_of_onnxruntime_computes_the_adapter(tmp_path: Path) -> None:
    # y = x W + x A B, whose A and B are inputs with initializers of rank 0
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (3, 6)))
    made = adapter([lora("m.q", 4, 6)])
    ort_adapter.write(made, tmp_path)
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 6] x, float[6, r] a, float[r, 4] b, float[6, 4] w) => (float[n, 4] y) {
            plain = MatMul(x, w)
            inner = MatMul(x, a)
            change = MatMul(inner, b)
            y = Add(plain, change)
        }""")
    names = {"a": "m.q.lora_A.weight", "b": "m.q.lora_B.weight"}
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for name, shape in ((names["a"], (6, 0)), (names["b"], (0, 4))):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)
        )
    onnx.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    active = onnxruntime.LoraAdapter()
    active.Load(str(tmp_path / "adapter.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(active)
    feeds = {"x": x, "w": w}
    np.testing.assert_allclose(session.run(None, feeds)[0], x @ w, rtol=1e-5, atol=1e-5)
    wanted = x @ (w + delta(made.sites[0]).T)
    np.testing.assert_allclose(session.run(None, feeds, options)[0], wanted, rtol=1e-5, atol=1e-4)


def test_peft_refuses_a_directory_without_its_config(tmp_path: Path) -> None:
    kohya.write(adapter([lora("m.q", 4, 6)]), tmp_path)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftConfig.from_pretrained(str(tmp_path), local_files_only=True)
