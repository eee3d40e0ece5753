"""ONNX Runtime's adapter: shapes as x meets them, the scale in B, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import adapter, delta, llama, lora, numbers
from onnxruntime import AdapterFormat, OrtValue

from lorasurgery.adapter import AdapterConfig
from lorasurgery.dialects import ort_adapter
from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo


def exported(path: Path, parameters: dict[str, Any]) -> Path:
    made = AdapterFormat()
    made.set_parameters({n: OrtValue.ortvalue_from_numpy(p) for n, p in parameters.items()})
    made.export_adapter(str(path))
    return path


def test_parameters_are_as_x_meets_them_with_the_scale_in_b(tmp_path):
    made = llama()
    ort_adapter.write(made, tmp_path)
    found = AdapterFormat.read_adapter(str(tmp_path / "adapter.onnx_adapter")).get_parameters()
    assert len(found) == 2 * len(made.sites)
    for site in made.sites:
        a, b = (found[f"{site.module}.lora_{ab}.weight"].numpy() for ab in "AB")
        assert a.shape[1] == site.config.rank
        np.testing.assert_array_equal(a, site.load()["A"].T)
        x = numbers((2, a.shape[0]))
        np.testing.assert_allclose(x @ a @ b, x @ delta(site).T, rtol=1e-5, atol=1e-4)


def test_float16_stays_float16(tmp_path):
    site = lora("a.b", 4, 6)
    halves = {n: TensorInfo(i.name, "F16", i.shape) for n, i in site.factors.items()}
    ort_adapter.write(adapter([replace(site, factors=halves)]), tmp_path)
    found = AdapterFormat.read_adapter(str(tmp_path / "adapter.onnx_adapter")).get_parameters()
    assert {p.data_type() for p in found.values()} == {"tensor(float16)"}
    (again,) = ort_adapter.read(tmp_path).sites
    np.testing.assert_array_equal(delta(again), delta(site))


PROBLEMS = {
    "a strange name": ({"x.bias": numbers((4,))}, "x.bias tensor(float) [4] is no factor of a LoRA"),
    "integers": (
        {"x.lora_A": np.ones((4, 2), np.int64)}, "x.lora_A tensor(int64) [4, 2] is no factor of a LoRA",
    ),
    "a factor alone": (
        {"x.lora_A.weight": numbers((4, 2))}, "x.lora_A.weight stands alone: x needs lora_A and lora_B",
    ),
    "ranks that differ": (
        {"x.lora_A": numbers((4, 2)), "x.lora_B": numbers((3, 4))},
        "x: A [4, 2] and B [3, 4] are no factors for x A B",
    ),
    "rank 0": (
        {"x.lora_A": numbers((4, 0)), "x.lora_B": numbers((0, 4))},
        "x: A [4, 0] is of rank 0 and does nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_not_understood_is_a_problem(tmp_path, case):
    tensors, message = PROBLEMS[case]
    good = {"m.q.lora_A.weight": numbers((4, 2)), "m.q.lora_B.weight": numbers((2, 6), 1)}
    found = ort_adapter.read(exported(tmp_path / "x.onnx_adapter", {**good, **tensors}))
    assert [p.message for p in found.problems] == [message]
    assert [s.module for s in found.sites] == ["m.q"]
    wanted = (good["m.q.lora_A.weight"] @ good["m.q.lora_B.weight"]).T
    np.testing.assert_array_equal(delta(found.sites[0]), wanted)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    ort_adapter.write(llama(), tmp_path)
    file = tmp_path / "adapter.onnx_adapter"
    file.write_bytes(file.read_bytes()[:200])
    assert ort_adapter.detect(file)
    with pytest.raises(FormatError) as error:
        ort_adapter.read(file)
    text = str(error.value)
    assert text.startswith(f"{file}: onnxruntime cannot read it (")
    assert text.endswith("). Restore the file.")
    file.write_bytes(b"x" * 50)
    assert not ort_adapter.detect(file)


def test_what_x_a_b_cannot_say_is_refused(tmp_path):
    with pytest.raises(FormatError) as error:
        ort_adapter.write(adapter([replace(lora("c", 4, 6), kernel=(1, 1))]), tmp_path)
    assert str(error.value) == "made/by-hand: c is a convolution, which x A B is not. Merge it."
    made = adapter([lora("c", 4, 6, AdapterConfig("dora", 3, 6.0))])
    with pytest.raises(FormatError) as error:
        ort_adapter.write(made, tmp_path)
    assert str(error.value) == (
        "made/by-hand: c is a dora, which ONNX Runtime cannot say. Merge it, convert it, or write another "
        "dialect."
    )
