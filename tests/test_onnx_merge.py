"""Adapters merged into ONNX files, taken out again, verified; by the command line, run by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as h
import pytest
from click.testing import Result
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from tests import onnx_files as made

SHAPES = {
    "layer.0.query": (made.MID, made.IN), "layer.0.key": (made.OUT, made.MID),
    "layer.0.value": (50, made.OUT),
}  # fmt: skip
NAMES = {
    "layer.0.query": "onnx::MatMul_7", "layer.0.key": "layer.0.key.weight",
    "layer.0.value": "layer.0.value.weight",
}  # fmt: skip


def surgery(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = surgery(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def tensors(path: Path) -> dict[str, np.ndarray]:
    held = onnx.load(path).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in held}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter, and where to write."""
    base = made.chain(tmp_path / "base.onnx")
    # what a trainer says of GPT-2's weights says nothing of the graph's
    adapter = made.adapter(tmp_path / "adapter", SHAPES, fan_in_fan_out=True)
    return base, adapter, tmp_path / "out.onnx"


def test_a_merge_changes_each_weight_as_it_is_stored(files: tuple[Path, Path, Path]) -> None:
    base, adapter, out = files
    report = json.loads(done("merge", base, f"{adapter}:0.5", "-o", out, "--json").stdout)
    onnx.checker.check_model(out)
    before, after = tensors(base), tensors(out)
    for module, name in NAMES.items():
        change = 0.5 * made.delta(adapter, module)
        change = change.T if name == "onnx::MatMul_7" else change
        np.testing.assert_allclose(after[name], before[name] + change, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(after["b"], before["b"])
    assert report["total"]["retained"] == pytest.approx(1, abs=1e-4)
    x = made.drawn(4, made.IN)
    q, k, v = (
        made.drawn(made.IN, made.MID).T,
        made.drawn(made.OUT, made.MID),
        made.drawn(50, made.OUT),
    )
    q, k, v = (w + 0.5 * made.delta(adapter, m) for w, m in zip((q, k, v), SHAPES, strict=True))
    want = (x @ q.T @ k.T + made.drawn(made.OUT)) @ v.T
    np.testing.assert_allclose(made.run(out, x), want, rtol=1e-4, atol=1e-6)


def test_a_dry_run_shows_which_module_is_which_initializer(files: tuple[Path, Path, Path]) -> None:
    base, adapter, out = files
    shown = done("merge", base, adapter, "--dry-run").stdout.splitlines()
    assert {line.split("  ")[0] for line in shown[1:4]} == {
        "layer.0.query <- onnx::MatMul_7", "layer.0.key", "layer.0.value",
    }  # fmt: skip
    assert not out.exists()


def test_a_merge_is_verified_and_taken_out_again(files: tuple[Path, Path, Path]) -> None:
    base, adapter, out = files
    done("merge", base, adapter, "-o", out)
    assert "verdict    holds" in done("verify", out, "--base", base, "-a", adapter).stdout
    wrong = surgery("verify", base, "--base", base, "-a", adapter)
    assert wrong.exit_code == 3
    assert wrong.stderr.splitlines()[-1] == (
        f"error: {base}: layer.0.query.weight: missing: the adapter is not in it, and 2 more do not "
        "hold. Merge again from the base."
    )
    back = out.with_name("back.onnx")
    done("unmerge", out, adapter, "-o", back)
    for name, w in tensors(base).items():
        np.testing.assert_allclose(tensors(back)[name], w, rtol=0, atol=2e-8)  # a step


def test_modules_are_named_by_hand(tmp_path: Path) -> None:
    base = tmp_path / "m.onnx"
    weights = made.nameless(base)
    adapter = made.adapter(tmp_path / "a", {"up": (8, 8), "down": (8, 8)})
    names = tmp_path / "map.yaml"
    names.write_text("up: second\ndown: one\n")
    out = tmp_path / "o.onnx"
    done("merge", base, adapter, "-o", out, "--map", names)
    after = tensors(out)
    for module, name in (("up", "two"), ("down", "one")):
        want = weights[name] + made.delta(adapter, module).T
        np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-7)
    done("verify", out, "--base", base, "-a", adapter, "--map", names)


def test_a_shared_weight_becomes_one_of_its_own(tmp_path: Path) -> None:
    base, out = made.tied(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    adapter = made.adapter(tmp_path / "a", {"layer.0.up": (64, 64), "layer.1.up": (64, 64)})
    shown = done("merge", base, adapter, "-o", out)
    assert (
        "note: layer.0.up: shared layer.0.up.weight, and has a weight of its own now."
        in shown.stderr.splitlines()
    )
    w, x = made.drawn(64, 64), made.drawn(3, 64)
    np.testing.assert_array_equal(tensors(out)["layer.0.up.weight"], w)
    first = w + made.delta(adapter, "layer.0.up").T
    second = w + made.delta(adapter, "layer.1.up")
    want = x @ first @ second.T + w[3]
    np.testing.assert_allclose(made.run(out, x), want, rtol=1e-4, atol=1e-6)
    assert "verdict    holds" in done("verify", out, "--base", base, "-a", adapter).stdout


def test_float16_weights_are_rounded_once_and_what_was_kept_is_said(tmp_path: Path) -> None:
    w = made.drawn(16, 24).astype(np.float16)
    node = h.make_node("MatMul", ["x", "up.weight"], ["y"])
    base = made.save(tmp_path / "m.onnx", [node], {"up.weight": w}, (16, 24))
    adapter, out = made.adapter(tmp_path / "a", {"up": (24, 16)}), tmp_path / "o.onnx"
    done("merge", base, adapter, "-o", out)
    exact = w.astype(np.float64) + made.delta(adapter, "up").T
    # a double rounding would need a tie in float32
    np.testing.assert_array_equal(tensors(out)["up.weight"], exact.astype(np.float16))
    small = surgery(
        "merge", base, f"{adapter}:0.001", "-o", tmp_path / "p.onnx", "--min-retained", 0.999
    )
    assert small.exit_code == 3
    assert "less than --min-retained 0.999: nothing was written." in small.stderr
    assert not (tmp_path / "p.onnx").exists()


# --- errors


def test_an_adapter_that_has_no_place_is_one_error(files: tuple[Path, Path, Path]) -> None:
    base, _, out = files
    other = made.adapter(out.with_name("other"), {"layer.9.query": (4, 4)})
    result = surgery("merge", base, other, "-o", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: {other}: layer.9.query.weight is adapted, but {base} has no such tensor. Did you mean "
        "'layer.0.query.weight'. Mend it, or leave it out with --allow-unmatched "
        "'base_model.model.layer.9.query.lora_A.weight'.\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("up: nothing", "{base}: --map up: no weight goes by the name 'nothing'. Known: "),
        (
            "[1, 2]",
            "{map}: is no YAML of `module: initializer or node`, one a line. Mend the file.",
        ),
        ("up: [", "{map}: is no YAML of `module: initializer or node`, one a line. Mend the file."),
    ],
)
def test_maps_that_name_nothing_are_refused(
    files: tuple[Path, Path, Path], content: str, message: str
) -> None:
    base, adapter, out = files
    names = out.with_name("map.yaml")
    names.write_text(content)
    result = surgery("merge", base, adapter, "-o", out, "--map", names)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: " + message.format(base=base, map=names))


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("merge", "{base}", "{adapter}", "--dtype", "float16"), "--dtype"),
        (("merge", "{base}", "{adapter}", "--requantize", "rtn"), "--requantize"),
        (("unmerge", "{base}", "{adapter}", "--tied", "untie"), "--tied"),
        (("quantize", "{base}", "--no-double-quant"), "--no-double-quant"),
        (("quantize", "{base}", "--resume"), "--resume"),
    ],
)
def test_flags_that_mean_nothing_to_onnx_are_refused(
    files: tuple[Path, Path, Path], arguments: tuple[str, ...], flag: str
) -> None:
    base, adapter, out = files
    texts = [text.format(base=base, adapter=adapter) for text in arguments]
    result = surgery(*texts, "-o", out)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {flag}: means nothing to an ONNX file, and {base} is one. Take it away.\n"
    )


def test_onnx_flags_are_refused_elsewhere(tmp_path: Path) -> None:
    for arguments, message in (
        (("quantize", tmp_path, "--weights", "int4"), f"--weights int4: needs an ONNX file, and {tmp_path} is none. Export it first."),
        (("quantize", tmp_path, "--zero-points"), "--zero-points: belongs to integers. Pass --weights int4 or int8, or take it away."),
        (("merge", tmp_path, "a", "--map", "m"), f"--map: needs an ONNX file, and {tmp_path} is none. Take it away."),
        (("unmerge", tmp_path, "a", "--map", "m"), f"--map: needs an ONNX file, and {tmp_path} is none. Take it away."),
    ):  # fmt: skip
        result = surgery(*arguments, "-o", tmp_path / "o")
        assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


def test_quantize_of_the_command_line_writes_what_runs(tmp_path: Path) -> None:
    base, out = made.chain(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    done("quantize", base, "-o", out, "--weights", "int4", "--zero-points", "--accuracy-level", 1)
    shown = done("inspect", out).stdout
    assert "quantized       MatMulNBits int4, blocks of 32: 3 nodes" in shown.splitlines()
    x = made.drawn(4, made.IN)
    near, exact = made.run(out, x), made.run(base, x)
    assert np.linalg.norm(near - exact) < 0.2 * np.linalg.norm(exact)
