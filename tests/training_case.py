"""A small Llama with a tokenizer of bytes, and real text for it: what every test of training begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasurgery.output import OutputOptions
from lorasurgery.surgery import RunOptions
from lorasurgery.training import method as methods
from lorasurgery.training import train as training
from lorasurgery.training.examples import Reading
from lorasurgery.training.kept import Kept, Weighed
from lorasurgery.training.method import Wanted
from lorasurgery.training.options import Machine, Pace, TrainOptions
from lorasurgery.training.setup import Prepared, prepare

TEXT = (
    Path(__file__).parents[1] / "benchmarks" / "texts" / "moby-dick.txt"
)  # one that no edit changes
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCAB = 260


@cache
def kept() -> str:
    """A file as `select` writes it: of each layer, two modules matter."""
    sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
             "gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}  # fmt: skip
    weighed = []
    for layer in range(2):
        for name, (out, in_) in sizes.items():
            path = f"model.layers.{layer}.{'mlp' if out == 48 or in_ == 48 else 'self_attn'}.{name}"
            keep = name == "q_proj" or (name, layer) in (("down_proj", 1), ("v_proj", 0))
            weighed.append(Weighed(path, f"{name}.{out}x{in_}", 1.0, 1 / 14, 0.5, keep))
    file = Path(mkdtemp()) / "kept.json"
    Kept(tuple(weighed), {}).write(file)
    return str(file)


# what a method cannot do without, or does nothing without in three steps
OWN: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "lora-drop": lambda: {"keep": kept()},
    # few enough are left out that no module loses all
    "adalora": lambda: {"init_r": 5},
    "delta-lora": lambda: {"strength": 0.5, "start": 0},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and <eos>."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<eos>"] = 256
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", chat_template=TEMPLATE)


def llama(**changes: Any) -> LlamaForCausalLM:
    """32 thousand parameters; queries and keys differ in their sizes, biases are not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, **changes,
    })  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_base(folder: Path, **changes: Any) -> Path:
    """The model and its tokenizer as a directory."""
    llama(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def options(method: str = "lora", *, own: Any = None, **changes: Any) -> TrainOptions:
    """A few quick steps on the text; `changes` are fields of Pace."""
    if own is None and method in OWN:
        own = methods.load(method).Options(**OWN[method]())
    pace = Pace(**{"steps": 3, "batch": 2, **changes})
    return TrainOptions(
        method, (str(TEXT),), "made/here", Wanted(rank=4), own, reading=Reading(48), pace=pace,
        machine=Machine(device="cpu"),
    )  # fmt: skip


def begin(base: Path, asked: TrainOptions) -> Prepared:
    return prepare(base, asked)


def steps(prepared: Prepared, count: int) -> list[float]:
    """The losses of the next steps."""
    return [prepared.trainer.step()["loss"] for _ in range(count)]


def run(base: Path, output: Path, asked: TrainOptions, **how: Any) -> Mapping[str, float]:
    """Train into a directory; the report's totals."""
    running = RunOptions(OutputOptions(**how))
    return training.train(base, output, asked, running).report.total


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a fixed text, without dropout."""
    tokens = torch.arange(40)[None] * 6 % 256
    training_now = model.training
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits[0]
    model.train(training_now)
    return found


__all__ = ["begin", "llama", "logits", "options", "replace", "run", "save_base", "steps"]
