"""What the demo trains is read by PEFT, and does there what it did while it was trained."""

import copy

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from demo.train import adapt, save


def test_peft_reads_the_demo_adapter_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    base = LlamaForCausalLM(shape).eval()
    tokens = torch.randint(0, 128, (2, 7))
    trained = copy.deepcopy(base)
    layers = adapt(trained)
    assert len(layers) == 14
    for layer in layers.values():
        torch.nn.init.normal_(layer.b, std=0.02)
    save(layers, tmp_path / "base", tmp_path / "adapter")
    with torch.no_grad():
        before, wanted = base(tokens).logits, trained(tokens).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        got = loaded(tokens).logits
    assert (wanted - before).abs().max() > 0.01
    # float32 sums in another order
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
