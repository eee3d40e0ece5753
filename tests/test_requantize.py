"""What merge --requantize reports is what the files hold, in float64; and the weights pass by once."""

import json

import ml_dtypes
import numpy as np
import pytest
from merge_files import CONFIG, PREFIX, Q, adapter, array, factors, surgery
from safetensors.numpy import load_file, save_file

from lorasurgery.edit import Step
from lorasurgery.kernels.nf4_dequantize import NF4
from lorasurgery.operations.merging.requantize import POLICIES

NAME = f"{Q}.weight"
SCALE = np.float32(CONFIG["lora_alpha"] / CONFIG["r"])
FLAGS = {"stochastic": ("--seed", 5), "residual": ("--rank", 4)}
# float64's own, of sums that cancel a few digits
EXACT = 1e-9
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def small(data):
    return (np.float32(0.02) * data).astype(np.float32)


def made(folder, shape, dtype, *flags):
    """A model of one linear layer, and it in NF4."""
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False
    }  # fmt: skip
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    w = small(array(*shape)).astype(DTYPES[dtype])
    save_file({NAME: w}, base / "model.safetensors", {"format": "pt"})
    done("quantize", base, "-o", folder / "nf4", *flags)
    return base, folder / "nf4"


def done(*args):
    result = surgery(*args)
    assert result.exit_code == 0, result.output


def merge(packed, lora, out, policy, *flags):
    more = FLAGS.get(policy, ())
    done(
        "merge",
        packed,
        lora,
        "-o",
        out,
        "--requantize",
        policy,
        "--min-retained",
        -99,
        *more,
        *flags,
    )


def originally(policy, base):
    """What one of the policies asks for."""
    return ("--original", base) if policy == "from-original" else ()


def scales(stored, state):
    """float32, as bitsandbytes un-nests them."""
    absmax = stored[f"{NAME}.absmax"]
    if "nested_absmax" not in "".join(stored):
        return absmax
    outer = np.repeat(stored[f"{NAME}.nested_absmax"], state["nested_blocksize"])[: len(absmax)]
    return stored[f"{NAME}.nested_quant_map"][absmax] * outer + np.float32(state["nested_offset"])


def read(path):
    """Level and scale of every weight [out, in], and their state."""
    stored = load_file(path / "model.safetensors")
    state = json.loads(bytes(stored[f"{NAME}.quant_state.bitsandbytes__nf4"]))
    n = int(np.prod(state["shape"]))
    codes = stored[NAME].reshape(-1)
    pairs = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]
    table = stored[f"{NAME}.quant_map"].astype(np.float32)
    scale = np.repeat(scales(stored, state), state["blocksize"])[:n]
    return table[pairs].reshape(state["shape"]), scale.reshape(state["shape"]), state


def held(base, merged, d):
    """Signal, power and noise2 of the merged files beside the base's, a residual adapter's included."""
    level, scale, state = read(base)
    before = (level * scale).astype(DTYPES[state["dtype"]]).astype(np.float64)
    level, scale, _ = read(merged)
    after = level.astype(np.float64) * scale
    beside = merged / "residual_adapter/adapter_model.safetensors"
    if beside.exists():
        found = load_file(beside)
        b, a = (found[f"{PREFIX}{Q}.lora_{x}.weight"].astype(np.float64) for x in "BA")
        after = after + b @ a
    change, d = after - before, d.astype(np.float64)
    return (change * d).sum(), (d * d).sum(), np.square(change - d).sum()


def delta(low):
    """B A in float32, one rank after another: what the base would have in an exact merge."""
    a, b = low[f"{PREFIX}{Q}.lora_A.weight"], SCALE * low[f"{PREFIX}{Q}.lora_B.weight"]
    d = np.zeros((len(b), a.shape[1]), np.float32)
    for k in range(len(a)):
        d = d + np.outer(b[:, k], a[k])
    return d


def reported(merged):
    found = json.loads((merged / "surgery.json").read_text())["tensors"][NAME]["metrics"]
    return found["signal"], found["power"], found["noise2"]


def close(found, wanted, rel):
    (signal, power, noise2), room = wanted, np.sqrt(wanted[1] * (wanted[1] + wanted[2]))
    assert found[1:] == pytest.approx((power, noise2), rel=rel)
    # terms of both signs
    assert found[0] == pytest.approx(signal, rel=rel, abs=rel * room)


# rows that end inside of blocks and bytes, short last blocks; several tiles of 64 KiB of codes
SHAPES = [((9, 37), "bfloat16", 32), ((300, 514), "float16", 64), ((640, 256), "float32", 128)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("double", ["--double-quant", "--no-double-quant"])
@pytest.mark.parametrize(("shape", "dtype", "block"), SHAPES, ids=str)
def test_what_is_reported_is_what_the_files_hold(tmp_path, shape, dtype, block, double, policy):
    base, packed = made(tmp_path / "m", shape, dtype, "--block-size", block, double)
    low = {k: small(f) for k, f in factors(Q, shape[1], shape[0]).items()}
    lora = adapter(tmp_path / "lora", low)
    flags = (*originally(policy, base), "--max-memory", "1MB", "--jobs", 2)
    merge(packed, lora, tmp_path / "out", policy, *flags)
    # the lost part of a residual is held in float32
    # what a residual leaves is told by its product with what was lost, kept in float32: of few weights
    rel = 1e-6 if policy == "residual" and np.prod(shape) < 1000 else EXACT
    close(reported(tmp_path / "out"), held(packed, tmp_path / "out", delta(low)), rel)


@pytest.fixture
def seen(monkeypatch):
    """(the checkpoint's class, tensor) of each pass that an operation makes over a tensor."""
    found, tiles = [], Step.tiles

    def watched(step, source, name, multiple=1):
        found.append((type(source).__name__, name))
        return tiles(step, source, name, multiple)

    monkeypatch.setattr(Step, "tiles", watched)
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_the_weights_pass_by_once_but_for_what_a_residual_is_made_of(tmp_path, seen, policy):
    base, packed = made(tmp_path / "m", (9, 37), "bfloat16", "--block-size", 32)
    lora = adapter(tmp_path / "lora", factors(Q, 37, 9))
    seen.clear()
    merge(packed, lora, tmp_path / "out", policy, *originally(policy, base))
    straight = [("Weights", NAME)] if policy == "from-original" else [("File", NAME)]
    assert seen == straight + [("Weights", NAME)] * (policy == "residual")


@pytest.mark.parametrize("policy", POLICIES)
def test_an_undo_file_beside_it_changes_no_byte_and_no_number(tmp_path, policy):
    base, packed = made(tmp_path / "m", (300, 514), "bfloat16")
    lora = adapter(tmp_path / "lora", factors(Q, 514, 300))
    for name, more in (("alone", ()), ("undone", ("--undo", tmp_path / "undo"))):
        merge(packed, lora, tmp_path / name, policy, *originally(policy, base), *more)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "undone")]
    assert files[0] == files[1]
    assert reported(tmp_path / "alone") == reported(tmp_path / "undone")


@pytest.mark.parametrize("policy", ["rtn", "keep-absmax", "residual"])
def test_a_change_that_no_small_factors_make_is_measured_as_well(tmp_path, policy):
    _, packed = made(tmp_path / "m", (300, 514), "bfloat16", "--block-size", 32)
    low = {k: small(f) for k, f in factors(Q, 514, 300).items()}
    m = 0.5 + np.abs(array(300))
    dora = {**low, f"{PREFIX}{Q}.lora_magnitude_vector": m}
    merge(packed, adapter(tmp_path / "lora", dora, {"use_dora": True}), tmp_path / "out", policy)
    level, scale, _ = read(packed)
    w = (level * scale).astype(ml_dtypes.bfloat16).astype(np.float64)
    moved = w + delta(low)
    d = m[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - w
    # the change itself is made in float32
    close(reported(tmp_path / "out"), held(packed, tmp_path / "out", d), 1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_levels_that_a_trainer_rounded_count_as_the_file_has_them(tmp_path, policy):
    base, packed = made(tmp_path / "m", (300, 514), "float32")
    stored = load_file(packed / "model.safetensors")
    stored[f"{NAME}.quant_map"] = NF4.astype(ml_dtypes.bfloat16)
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    low = {k: small(f) for k, f in factors(Q, 514, 300).items()}
    lora = adapter(tmp_path / "lora", low)
    merge(packed, lora, tmp_path / "out", policy, *originally(policy, base))
    close(reported(tmp_path / "out"), held(packed, tmp_path / "out", delta(low)), EXACT)


@pytest.mark.parametrize("word", ["bfloat16", "float32"])
def test_codes_that_are_stored_as_wider_words_are_the_same_codes(tmp_path, word):
    _, packed = made(tmp_path / "m", (300, 512), "bfloat16")
    lora = adapter(tmp_path / "lora", factors(Q, 512, 300))
    flags = ("--max-memory", "1MB")
    merge(packed, lora, tmp_path / "bytes", "rtn", *flags)
    stored = load_file(packed / "model.safetensors")
    stored[NAME] = stored[NAME].reshape(-1).view(DTYPES[word])[:, None]
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    merge(packed, lora, tmp_path / "words", "rtn", *flags)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("bytes", "words"))
    assert one.keys() == other.keys()
    for name, data in one.items():
        np.testing.assert_array_equal(other[name], data)
    assert reported(tmp_path / "bytes") == reported(tmp_path / "words")
