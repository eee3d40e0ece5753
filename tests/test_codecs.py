"""Laws of every codec: what is packed, written and read again is the weight, within its error."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorasurgery import plugins
from lorasurgery.codec import CodecOptions, Rule, Stored
from lorasurgery.codecs import nf4
from lorasurgery.errors import FormatError, ValueRangeError
from lorasurgery.formats import safetensors
from lorasurgery.kernels import lora_delta
from lorasurgery.tensors import TensorInfo
from lorasurgery.weights import Weights, codec_of

CODECS = plugins.names("codecs")
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
FAST = settings(max_examples=40, deadline=None)


def weight(shape, dtype, seed=0):
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
    return drawn.astype(DTYPES[dtype])


def pack(codec, w, dtype, options, name="layer.weight", tile=10**9):
    """Facts, all stored parts by name, and the scales as they decode."""
    packed = codec.parts(TensorInfo(name, dtype, w.shape), options)
    step = max(1, tile // codec.multiple(packed)) * codec.multiple(packed)
    flat = w.reshape(-1)
    tiles = [
        codec.encode(flat[s : s + step], packed, Rule(offset=s)) for s in range(0, w.size, step)
    ]
    sealed, scales = codec.seal(np.concatenate([scale for _, scale in tiles]), packed)
    stored = {packed.codes: np.concatenate([codes for codes, _ in tiles])}
    stored |= {packed.info.name + part: data for part, data in sealed.items()}
    return packed, stored, scales


@pytest.mark.parametrize("name", CODECS)
@FAST
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    dtype=st.sampled_from([*DTYPES]),
    block=st.sampled_from([32, 64, 512]),
    double=st.booleans(),
    tile=st.integers(1, 4000),
)
def test_parts_are_as_announced_and_free_of_tiling(name, shape, dtype, block, double, tile):
    codec, w, options = codec_of(name), weight(shape, dtype), CodecOptions(block, double)
    packed, stored, scales = pack(codec, w, dtype, options)
    assert {info.name: info.nbytes for info in packed.parts.values()} == {
        key: data.nbytes for key, data in stored.items()
    }
    _, tiled, again = pack(codec, w, dtype, options, tile=tile)
    assert {k: v.tobytes() for k, v in tiled.items()} == {k: v.tobytes() for k, v in stored.items()}
    np.testing.assert_array_equal(again, scales)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
def test_a_written_weight_is_found_and_decodes_within_half_a_step(tmp_path, name, dtype, double):
    codec, w = codec_of(name), weight((37, 75), dtype)
    packed, stored, scales = pack(codec, w, dtype, CodecOptions(64, double))
    shaped = {i.name: stored[i.name].reshape(i.shape) for i in packed.parts.values()}
    save_file({**shaped, "norm": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    source = safetensors.open(tmp_path / "x.safetensors")
    found = codec.group(source)
    assert [*found] == ["layer.weight"]
    assert found["layer.weight"].info == packed.info
    assert found["layer.weight"].parts == dict(packed.parts)
    np.testing.assert_array_equal(codec.scales(found["layer.weight"], source.read), scales)
    table = codec.table(found["layer.weight"], source.read)
    decoded = Weights(source).read("layer.weight")
    assert decoded.dtype == DTYPES[dtype]
    # half the widest gap between levels, at each weight's scale; and the scales' own rounding
    fresh = np.maximum.reduceat(np.abs(w.reshape(-1).astype(np.float32)), np.arange(0, w.size, 64))
    half, scale = np.diff(table).max() / 2, np.repeat(np.maximum(scales, fresh), 64)[: w.size]
    bound = half * scale + np.repeat(np.abs(scales - fresh), 64)[: w.size]
    error = np.abs(decoded.astype(np.float64) - w.astype(np.float64)).reshape(-1)
    assert (error <= bound * (1 + 2**-7)).all()  # the result is rounded to 16 bits
    assert error.max() > 0


@pytest.mark.parametrize("name", CODECS)
def test_the_same_codes_decode_to_any_dtype(name):
    codec, w = codec_of(name), weight((8, 40), "BF16")
    packed, stored, scales = pack(codec, w, "BF16", CodecOptions())
    table = stored["layer.weight.quant_map"]
    wide = codec.decode(stored[packed.codes], scales, table, w.size, codec.as_dtype(packed, "F32"))
    assert wide.dtype == np.float32
    narrow = codec.decode(stored[packed.codes], scales, table, w.size, packed)
    np.testing.assert_array_equal(narrow, wide.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", CODECS)
def test_kept_scales_give_the_codes_they_came_with(name):
    codec, w = codec_of(name), weight((16, 64), "F32")
    packed, stored, scales = pack(codec, w, "F32", CodecOptions(64, double=False))
    codes, kept = codec.encode(w.reshape(-1), packed, Rule(absmax=scales))
    np.testing.assert_array_equal(codes, stored[packed.codes])
    np.testing.assert_array_equal(kept, scales)


@pytest.mark.parametrize("name", CODECS)
@FAST
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    dtype=st.sampled_from([*DTYPES]),
    seed=st.sampled_from([None, 5]),
    keep=st.booleans(),
)
def test_a_sum_is_encoded_as_its_float32_is_however_it_comes(name, shape, dtype, seed, keep):
    codec, w, options = codec_of(name), weight(shape, dtype), CodecOptions(32)
    packed, stored, scales = pack(codec, w, dtype, options)
    table = stored["layer.weight.quant_map"]
    w = codec.decode(stored[packed.codes], scales, table, w.size, packed).reshape(shape)
    base = weight(shape, dtype, seed=1)
    b, a = (weight(s, "F32", seed=s[0]) for s in ((shape[0], 3), (3, shape[1])))
    d = lora_delta.run(a, b)
    rule = Rule(absmax=scales if keep else None, seed=seed, offset=7)
    codes, absmax = codec.encode((w.astype(np.float32) + d).reshape(-1), packed, rule)
    held = Stored(stored[packed.codes], scales, table)
    own = codec.recode(held, (a, b), packed, rule)
    found = [
        own, codec.encode_sum(w, w, (a, b), packed, rule), codec.encode_sum(w, w, d, packed, rule),
        codec.encode_sum(w, base, (a, b), packed, rule), codec.encode_sum(w, base, d, packed, rule),
    ]  # fmt: skip
    for coded in found:
        np.testing.assert_array_equal(coded.codes, codes)
        np.testing.assert_array_equal(coded.absmax, absmax)
    for one, other in ((own, found[1]), (own, found[2]), (found[3], found[4])):
        np.testing.assert_allclose(one.moments, other.moments, rtol=1e-12, atol=1e-18)
    assert not np.array_equal(own.moments, found[3].moments)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_refused_by_name_and_place(name, bad, dtype):
    w = weight((4, 64), dtype)
    w[2, 5] = bad
    packed = codec_of(name).parts(TensorInfo("a.weight", dtype, w.shape), CodecOptions())
    message = (
        "a.weight: nan or inf among elements 1128 to 1191. Mend the weight, or leave it out with "
        "--exclude 'a.weight'."
    )
    low, rule = (np.zeros((1, 64), np.float32), np.zeros((4, 1), np.float32)), Rule(offset=1000)
    with pytest.raises(ValueRangeError, match=f"^{re.escape(message)}$"):
        codec_of(name).encode(w.reshape(-1), packed, rule)
    for change in (low, np.zeros((4, 64), np.float32)):
        with pytest.raises(ValueRangeError, match=f"^{re.escape(message)}$"):
            codec_of(name).encode_sum(w, w, change, packed, rule)


# --- NF4's own


def test_a_block_size_that_nobody_reads_is_refused():
    message = (
        "a.weight: block size 48 is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096. "
        "Pass one of them as --block-size."
    )
    with pytest.raises(ValueRangeError, match=f"^{re.escape(message)}$"):
        nf4.parts(TensorInfo("a.weight", "BF16", (4, 4)), CodecOptions(48))


def stored_file(tmp_path, change):
    w = weight((3, 70), "BF16")
    packed, stored, _ = pack(nf4, w, "BF16", CodecOptions())
    shaped = {i.name: stored[i.name].reshape(i.shape) for i in packed.parts.values()}
    change(shaped)
    save_file(shaped, tmp_path / "x.safetensors")
    return safetensors.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("part", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_part_is_named(tmp_path, part):
    source = stored_file(tmp_path, lambda parts: parts.pop(f"layer.weight{part}"))
    message = (
        f"{source.path}: layer.weight is nf4 [3, 70], but layer.weight{part} is missing. "
        "Restore the file."
    )
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        nf4.group(source)


@pytest.mark.parametrize(
    ("key", "cut", "message"),
    [
        ("layer.weight", 100, "layer.weight: 100 entries, but [3, 70] in blocks of 64 takes 105."),
        ("layer.weight.absmax", 3, "layer.weight.absmax: 3 entries, but [3, 70] in blocks of 64 takes 4."),
    ],
)  # fmt: skip
def test_parts_of_other_sizes_are_named(tmp_path, key, cut, message):
    def change(parts):
        parts[key] = parts[key][:cut].copy()

    source = stored_file(tmp_path, change)
    message = f"{source.path}: {message} Restore the file."
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        nf4.group(source)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{}", "shape None"),
        (b"nf4", "Expecting value: line 1 column 1 (char 0)"),
        (b'{"dtype": "complex", "shape": [1], "blocksize": 64}', "dtype 'complex'"),
    ],
)
def test_a_state_that_says_nothing_is_named(tmp_path, text, reason):
    key = "layer.weight.quant_state.bitsandbytes__nf4"
    source = stored_file(tmp_path, lambda parts: parts.update({key: np.frombuffer(text, np.uint8)}))
    message = f"{source.path}: {key}: not a quantization state ({reason}). Restore the file."
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        nf4.group(source)


def test_an_offset_of_any_length_fits_the_announced_state():
    for offset in (0.1, -1.2345678e-30, 3.4028234663852886e38, 1e-45):
        packed = nf4.parts(TensorInfo("a.weight", "BF16", (1, 64)), CodecOptions())
        sealed, _ = nf4.seal(np.full(1, offset, np.float32), packed)
        part = ".quant_state.bitsandbytes__nf4"
        assert sealed[part].size == packed.parts[part].numel
        assert json.loads(bytes(sealed[part]))["nested_offset"] == float(np.float32(offset))
