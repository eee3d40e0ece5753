"""An encoder of transformers as an ONNX graph, by torch's own exporter (extra `export`)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError, UsageError
from lorasurgery.model import Model

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

# model types whose forward takes tokens and returns states or logits, tried in the tests
ENCODERS = ("bert", "distilbert", "roberta")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTSIDE = 1 << 30  # a protocol buffer ends at 2 GiB


def check_encoder(model: Model) -> None:
    """Raise FormatError for what has another shape, UsageError where the exporter is not installed."""
    kind = model.config.get("model_type")
    if kind not in ENCODERS:
        raise FormatError(
            f"{model.path}: {kind or 'a model without config.json'} is no encoder that is exported "
            f"({', '.join(ENCODERS)}). Export it with its own tools, and quantize or merge the ONNX file."
        )
    missing = [n for n in ("transformers", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        raise UsageError(
            f"export: needs {' and '.join(missing)}. Run `pip install 'lorasurgery[export]'`."
        )


def export_encoder(folder: Path, file: Path, dtype: str) -> None:
    """Write the graph, batch and sequence free; the first output is that of the architecture's class."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = [n for n in config.architectures or () if hasattr(transformers, n)]
    loader = getattr(transformers, names[0]) if names else transformers.AutoModel
    with _quiet(), torch.no_grad():
        loaded = loader.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        inputs = [name for name in _INPUTS if name in _arguments(loaded)]
        output = (
            "logits" if hasattr(loaded, "base_model") and loaded.base_model is not loaded else ""
        )
        # two rows of a length that no dimension of the model has
        row = torch.full((2, 11), 1 + (config.pad_token_id or 0))
        example = {n: torch.zeros_like(row) if n == "token_type_ids" else row for n in inputs}
        example["attention_mask"] = torch.ones_like(row)
        example["attention_mask"][1, 7:] = 0
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=_longest(config))}
        program = torch.onnx.export(
            _first_output(loaded, inputs), tuple(example[n] for n in inputs), dynamo=True,
            input_names=inputs, output_names=[output or "last_hidden_state"],
            dynamic_shapes={"inputs": tuple(free for _ in inputs)}, verbose=False,
        )  # fmt: skip
        assert program is not None, "the TorchScript exporter returns none"
        size = sum(p.numel() * p.element_size() for p in loaded.parameters())
        _take_off_wrapper(program.model)
        program.save(file, external_data=size > _OUTSIDE)


def _arguments(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _longest(config: Any) -> int:
    """Positions; RoBERTa's begin behind the padding's."""
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return int(config.max_position_embeddings - offset)


def _first_output(model: nn.Module, names: list[str]) -> nn.Module:
    """The model as torch's exporter wants it: tensors in, one tensor out."""
    import torch

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            first: torch.Tensor = self.model(**dict(zip(names, inputs, strict=True)))[0]
            return first

    return First().eval()


def _take_off_wrapper(graph: ir.Model) -> None:
    """Names as the model's own: those of weights, and the modules that nodes came from."""
    scopes = "pkg.torch.onnx.name_scopes"
    for value in list(graph.graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    for node in graph.graph.all_nodes():
        if scopes in node.metadata_props:
            node.metadata_props[scopes] = node.metadata_props[scopes].replace("'model.", "'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of what it lacks for other models."""
    from transformers.utils import logging as theirs

    log = logging.getLogger("torch.onnx")
    level, shown = log.level, theirs.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        if shown:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]
