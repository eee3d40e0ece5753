"""Each policy of `merge --requantize` is a fused kernel's call: the codes and scales in the file, and the report's sums."""

import json
import math

import numpy as np
import pytest
import torch
from merge_files import CONFIG, OUT, PREFIX, Q, adapter, factors, make_base, surgery
from safetensors.numpy import load_file

from lorasurgery.kernels import nf4_dequantize, nf4_encode_merge, nf4_merge
from lorasurgery.kernels.nf4_dequantize import NF4
from lorasurgery.kernels.nf4_moments import finish
from lorasurgery.operations.merging.edits import Rounding
from lorasurgery.operations.merging.requantize import POLICIES

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME, BLOCK, SEED = f"{Q}.weight", 32, 5
SCALE = CONFIG["lora_alpha"] / CONFIG["r"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, its NF4 with plain scales, and an adapter for both."""
    folder = tmp_path_factory.mktemp("policies")
    base, lora = make_base(folder / "base"), adapter(folder / "adapter", factors(Q))
    flags = ("--block-size", BLOCK, "--no-double-quant")
    assert surgery("quantize", base, "-o", folder / "nf4", *flags).exit_code == 0
    return base, folder / "nf4", lora


def merged(files, out, policy):
    """The tensors of the output, and what the report says of the weight."""
    base, packed, lora = files
    flags = {"stochastic": ("--seed", SEED), "from-original": ("--original", base)}
    done = surgery(
        "merge", packed, lora, "-o", out, "--requantize", policy, "--min-retained", 0, *flags.get(policy, ())
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((out / "surgery.json").read_text())["tensors"][NAME]
    return load_file(out / "model.safetensors"), {**found, **found.get("metrics", {})}


def call(files, policy):
    """The kernel and its arguments."""
    base, packed, _ = files
    stored, plain = load_file(packed / "model.safetensors"), load_file(base / "model.safetensors")
    low = factors(Q)
    a = low[f"{PREFIX}{Q}.lora_A.weight"]
    b = np.float32(SCALE) * low[f"{PREFIX}{Q}.lora_B.weight"]
    assert b.shape[0] == OUT
    codes, absmax = stored[NAME].reshape(-1), stored[f"{NAME}.absmax"]
    if policy == "from-original":
        w = plain[NAME]
        base = nf4_dequantize.run(codes, absmax, BLOCK, w.size, w.dtype, NF4).reshape(w.shape)
        return nf4_encode_merge, (w, BLOCK, a, b, None, None, 0, base)
    seed = Rounding(SEED).of(NAME) if policy == "stochastic" else None
    keep = policy == "keep-absmax"
    return nf4_merge, (codes, absmax, BLOCK, a, b, np.dtype(np.float32), keep, seed)


def on_the_device(args):
    for x in args:
        if isinstance(x, np.ndarray):
            yield torch.from_numpy(x.copy()).to(DEVICE)
        else:
            yield torch.float32 if isinstance(x, np.dtype) else x


def array(data):
    return torch.as_tensor(data).cpu().numpy()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_s_codes_scales_and_sums_are_the_fused_kernel_s(files, tmp_path, policy):
    written, found = merged(files, tmp_path / "out", policy)
    kernel, args = call(files, policy)
    fused = kernel.run(*args), kernel.launch(*on_the_device(args))
    for codes, absmax, moments in fused:
        np.testing.assert_array_equal(array(codes), written[NAME].reshape(-1))
        np.testing.assert_array_equal(array(absmax), written[f"{NAME}.absmax"])
        # the report counts a residual as made
        if policy == "residual":
            continue
        signal, power, noise2 = finish(array(moments), array(absmax), array(absmax))
        assert found["retained"] == pytest.approx(signal / power, rel=1e-12)
        assert found["noise"] == pytest.approx(math.sqrt(noise2 / power), rel=1e-12)
