"""How an adapter and its weight are typed, and what is said when there is none."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorasurgery.errors import FormatError
from lorasurgery.operations._adapters import open_adapters, split_weight


def write_adapter(path):
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        "base_model.model.q.lora_A.weight": np.ones((2, 5), np.float32),
        "base_model.model.q.lora_B.weight": np.ones((3, 2), np.float32),
    }
    save_file(factors, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a", "a", 1.0), ("a:0.5", "a", 0.5), ("a:-1", "a", -1.0), ("a:+.25", "a", 0.25),
        ("a:1e-3", "a", 1e-3), ("org/name@main:2", "org/name@main", 2.0),
        (r"C:\adapters", r"C:\adapters", 1.0), (r"C:\adapters:0.5", r"C:\adapters", 0.5),
        ("a:b", "a:b", 1.0), ("a:nan", "a:nan", 1.0),
    ],
)  # fmt: skip
def test_a_number_after_the_last_colon_is_the_weight(text, name, weight):
    assert split_weight(text) == (name, weight)


def test_a_colon_in_the_name_of_what_exists_is_no_weight(tmp_path):
    write_adapter(tmp_path / "run:2")
    write_adapter(tmp_path / "run")
    both = open_adapters([str(tmp_path / "run:2"), f"{tmp_path / 'run'}:0.5"])
    assert [(adapter.path.name, weight) for adapter, weight in both] == [
        ("run:2", 1.0),
        ("run", 0.5),
    ]
    assert both[0][0].sites[0].module == "q"


def test_a_path_that_is_not_there_is_named(tmp_path):
    message = re.escape(
        f"{tmp_path / 'gone'}: no such file or directory. Check the adapter's path."
    )
    with pytest.raises(FormatError, match=f"^{message}$"):
        open_adapters([f"{tmp_path / 'gone'}:0.5"])


def test_a_directory_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FormatError) as caught:
        open_adapters([str(tmp_path)])
    assert str(caught.value) == (
        f"{tmp_path}: holds no adapter in a layout that is known (peft, surgery). Check the path."
    )
