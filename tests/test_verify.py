"""Verify: right merges hold, however they were rounded; what it prints, and how it exits."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from verify_case import (
    OTHERS,
    OUT_PROJ,
    RANK,
    SCALE,
    SHAPES,
    UP,
    Case,
    Q,
    all_modules,
    by_name,
    causes,
    decode,
    nf4,
)

from lorasurgery.cli.app import app
from lorasurgery.errors import MatchError, VerificationError
from lorasurgery.operations.verify import VerifyOptions, insist, verify


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def case(request, tmp_path):
    return Case(tmp_path, request.param)


@pytest.fixture
def bf16(tmp_path):
    return Case(tmp_path)


def test_a_right_merge_holds(case):
    found = case.verify(case.merged())
    assert causes(found) == {}
    assert found.holds
    for module in SHAPES:
        one = by_name(found)[f"{module}.weight"]
        assert (one.role, one.rounding) == ("adapted", "to the nearest")
        assert abs(one.rho - 1) < 0.05
    assert {by_name(found)[n].role for n in OTHERS} == {"untouched"}


def test_the_numbers_are_those_of_their_formulas(bf16):
    other = 3e-3 * bf16.randn(96, 80).double()
    found = by_name(bf16.verify(bf16.merged(**{OUT_PROJ: 1.5 * bf16.delta(OUT_PROJ) + other})))[
        f"{OUT_PROJ}.weight"
    ]
    w = bf16.base[f"{OUT_PROJ}.weight"].double()
    c, d = (
        (w + 1.5 * bf16.delta(OUT_PROJ) + other).to(torch.bfloat16).double() - w,
        bf16.delta(OUT_PROJ),
    )
    rho = float((c * d).sum() / d.square().sum())
    u = torch.linalg.svd(d)[0][:, :RANK]
    v = torch.linalg.svd(d)[2][:RANK].T
    left = c - rho * d
    out = left - u @ (u.T @ left)
    out -= out @ v @ v.T
    norm = float(d.norm())
    assert found.rho == pytest.approx(rho, rel=1e-4)
    assert found.noise == pytest.approx(float((c - d).norm()) / norm, rel=1e-4)
    assert found.outside == pytest.approx(float(out.norm()) / norm, rel=1e-3)
    inside = math.sqrt(float(left.square().sum() - out.square().sum())) / norm
    assert found.inside == pytest.approx(inside, rel=1e-2)
    nearest = (w + d).to(torch.bfloat16).double() - w - d
    assert found.expected == pytest.approx(float(nearest.norm()) / norm, rel=1e-3)


def test_a_small_change_that_rounding_ate_is_a_right_merge(tmp_path):
    case = Case(tmp_path, size=0.001)
    found = case.verify(case.merged())
    assert found.holds
    assert 0.3 < found.total["retained"] < 0.8  # as measured for bfloat16 at this size
    assert found.notes == (
        f"rounding kept {found.total['retained']:.3f} of the change. `lorasurgery merge` with "
        "--dtype float32 or --rounding stochastic keeps more.",
    )


def test_the_same_merge_does_not_hold_where_more_is_asked(tmp_path):
    case = Case(tmp_path, size=0.001)
    found = case.verify(case.merged(), min_retained=0.9)
    assert causes(found) == {}
    assert not found.holds
    with pytest.raises(VerificationError) as caught:
        insist(found)
    assert str(caught.value) == (
        f"{tmp_path / 'merged'}: {found.total['retained']:.3f} of the change is in it, less than "
        "--min-retained 0.9: it was lost in rounding, or never merged. Merge in another way: to "
        "float32, or with another --requantize policy."
    )


def by_chance(x, dtype, rng):
    """Up or down to a neighbour, with the odds of the distance: an unbiased rounding."""
    low = x.to(dtype)
    low = torch.where(low.double() > x, torch.nextafter(low, torch.full_like(low, -9)), low)
    high = torch.nextafter(low, torch.full_like(low, 9))
    share = (x - low.double()) / (high.double() - low.double())
    up = torch.rand(x.shape, generator=rng, dtype=torch.float64) < share
    return torch.where(up, high, low)


@pytest.mark.parametrize("size", [0.001, 0.02])
def test_a_merge_rounded_by_chance_holds(tmp_path, size):
    case = Case(tmp_path, size=size)
    merged = case.merged()
    for module in SHAPES:
        exact = case.base[f"{module}.weight"].double() + case.delta(module)
        merged[f"{module}.weight"] = by_chance(exact, torch.bfloat16, case.rng)
    found = case.verify(merged)
    assert found.holds, causes(found)
    assert {by_name(found)[f"{m}.weight"].rounding for m in SHAPES} == {"by chance"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 0.02, 3])
def test_a_merge_whose_delta_was_rounded_first_holds(tmp_path, dtype, size):
    case = Case(tmp_path, dtype, size=size)
    merged = case.merged()
    for module in SHAPES:
        a, b = case.factors[module]
        product = (b @ a).to(dtype) * SCALE
        merged[f"{module}.weight"] = case.base[f"{module}.weight"] + product
    assert causes(case.verify(merged)) == {}


def test_a_merge_to_another_dtype_holds(bf16):
    merged = {n: t.float() for n, t in bf16.base.items()}
    for module in SHAPES:
        merged[f"{module}.weight"] = (
            merged[f"{module}.weight"].double() + bf16.delta(module)
        ).float()
    found = bf16.verify(merged)
    assert found.holds, causes(found)
    assert found.total["noise"] < 1e-4


def test_two_adapters_hold_with_their_weights(case):
    other = {Q: case.pair(*SHAPES[Q])}
    case.write_adapter("other", other)
    a, b = other[Q]
    both = 0.5 * case.delta(Q) + 2 * SCALE * (b.double() @ a.double())
    merged = case.merged(0.5 * SCALE, **{Q: both})
    assert case.verify(merged, ["adapter:0.5", "other:2"]).holds


def test_saved_modules_are_the_adapters_own(bf16):
    new = bf16.randn(96)
    extra = {"model.norm.weight": new}
    bf16.write_adapter("saved", bf16.factors, extra, modules_to_save=["norm"])
    merged = {**bf16.merged(), "model.norm.weight": new.bfloat16()}
    found = bf16.verify(merged, ["saved"])
    assert found.holds
    assert by_name(found)["model.norm.weight"].role == "replaced"


def zero_case(case):
    """Of one module the adapter is as training begins: B is 0."""
    a, b = case.factors[Q]
    case.factors[Q] = (a, 0 * b)
    case.write_adapter("zero", case.factors)
    return case.merged()


def test_an_adapter_of_zeros_changes_nothing(bf16):
    found = bf16.verify(zero_case(bf16), ["zero"])
    assert found.holds
    assert by_name(found)[f"{Q}.weight"].rho is None


CAUSAL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def tied_case(tmp_path):
    case = Case(tmp_path)
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**CAUSAL, "tie_word_embeddings": True})
    )
    a, b = case.pair(50, 96)
    case.write_adapter("head", {"lm_head": (a, b)})
    w = case.base["model.embed_tokens.weight"]
    return case, (w.double() + SCALE * (b.double() @ a.double())).bfloat16()


@pytest.mark.parametrize("untied", [True, False])
def test_the_change_of_a_tied_head_is_found_where_the_merge_put_it(tmp_path, untied):
    case, head = tied_case(tmp_path)
    name = "lm_head.weight" if untied else "model.embed_tokens.weight"
    case.save("m", {**case.base, name: head}, **CAUSAL, tie_word_embeddings=not untied)
    found = verify(tmp_path / "m", tmp_path / "base", [str(tmp_path / "head")], VerifyOptions())
    assert found.holds, causes(found)
    assert by_name(found)[name].rho == pytest.approx(1, abs=0.05)


def test_a_merged_head_that_the_config_still_ties_is_named(tmp_path):
    case, head = tied_case(tmp_path)
    case.save("m", {**case.base, "lm_head.weight": head}, **CAUSAL, tie_word_embeddings=True)
    found = verify(tmp_path / "m", tmp_path / "base", [str(tmp_path / "head")], VerifyOptions())
    assert causes(found) == {
        "lm_head.weight": "config.json ties it to the embedding, so that it is never read: "
        "tie_word_embeddings must be false"
    }


@pytest.fixture(params=[0.01, 0.3], ids=["small", "large"])
def quantized(request, tmp_path):
    """A base in NF4; the case's own base is what it decodes to."""
    case = Case(tmp_path, size=request.param)
    (tmp_path / "base").rename(tmp_path / "plain")
    nf4(tmp_path / "plain", tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    case.base |= {f"{m}.weight": decode(stored, f"{m}.weight") for m in SHAPES}
    return case


def test_a_16_bit_merge_of_a_quantized_base_holds(quantized):
    found = quantized.verify(quantized.merged())
    assert found.holds, causes(found)


def test_an_unmerged_16_bit_copy_of_a_quantized_base_is_named(quantized):
    found = quantized.verify(quantized.base)
    assert causes(found) == all_modules("missing: the adapter is not in it")


def requantized(case, scale):
    """What a merge to 16 bits, quantized once more, is found to be."""
    case.save("sixteen", case.merged(scale))
    nf4(case.tmp / "sixteen", case.tmp / "m")
    adapter = str(case.tmp / "adapter")
    return verify(case.tmp / "m", case.tmp / "base", [adapter], VerifyOptions())


def test_a_requantized_merge_holds_only_if_the_change_is_kept(quantized):
    found = requantized(quantized, SCALE)
    large = quantized.size == 0.3
    assert causes(found) == {}
    assert found.min_retained == 0.9
    assert (found.total["retained"] > 0.9) == large
    assert found.holds == large


def test_a_quantized_tensor_whose_small_change_is_lost_is_noted(tmp_path):
    case = Case(tmp_path, size=0.3)
    a, b = case.factors[Q]
    case.factors[Q] = (a, 0.03 * b)
    case.write_adapter("uneven", case.factors)
    nf4(tmp_path / "base", tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    case.base |= {f"{m}.weight": decode(stored, f"{m}.weight") for m in SHAPES}
    case.save("again", case.merged())
    nf4(tmp_path / "again", tmp_path / "n")
    found = verify(tmp_path / "n", tmp_path / "b", [str(tmp_path / "uneven")], VerifyOptions())
    assert found.holds, causes(found)
    rho = by_name(found)[f"{Q}.weight"].rho
    assert rho < 0.3
    assert found.notes == (
        f"less than 0.9 of the change is in 1 quantized tensors, {rho:.3f} in {Q}.weight: lost in "
        "rounding, or never merged.",
    )


def test_a_requantized_merge_done_twice_does_not_hold(quantized):
    found = requantized(quantized, 2 * SCALE)
    assert not found.holds
    if quantized.size == 0.3:  # of a small change, rounding leaves nothing to tell it by
        assert causes(found) == all_modules("merged twice")


def test_an_adapter_part_without_a_place_is_refused_before_anything_is_read(bf16):
    bf16.write_adapter("lost", {"model.layers.7.self_attn.q_proj": bf16.factors[Q]})
    with pytest.raises(MatchError, match=r"model\.layers\.7\.self_attn\.q_proj\.weight is adapted"):
        bf16.verify(bf16.merged(), ["lost"])


@pytest.mark.parametrize("flip", [False, True])
def test_a_bit_of_an_untouched_quantized_weight_is_seen(quantized, flip):
    a, b = quantized.factors[Q]
    quantized.write_adapter("zero", {Q: (a, 0 * b)})
    stored = load_file(quantized.tmp / "base" / "model.safetensors")
    stored[f"{UP}.weight.absmax"][7] ^= flip
    found = quantized.verify(stored, ["zero"])
    cause = "changed in 1 of 15360 elements, though no adapter touches it"
    assert causes(found) == ({f"{UP}.weight": cause} if flip else {})


@pytest.mark.parametrize("config_ties", [True, False])
def test_a_head_stored_twice_may_be_left_out_where_the_config_ties_it(tmp_path, config_ties):
    case = Case(tmp_path)
    twice = {**case.base, "lm_head.weight": case.base["model.embed_tokens.weight"].clone()}
    save_file(twice, tmp_path / "base" / "model.safetensors")
    case.save("m", case.merged(), **CAUSAL, tie_word_embeddings=config_ties)
    found = verify(tmp_path / "m", tmp_path / "base", [str(tmp_path / "adapter")], VerifyOptions())
    assert causes(found) == ({} if config_ties else {"lm_head.weight": "missing: the base has it"})


def run_cli(case, *flags):
    adapter = str(case.tmp / "adapter")
    args = [
        "verify",
        str(case.tmp / "merged"),
        "--base",
        str(case.tmp / "base"),
        "--adapter",
        adapter,
    ]
    return CliRunner().invoke(app, [*args, *flags])


def test_the_command_prints_a_row_for_each_kind_and_succeeds(bf16):
    bf16.save("merged", bf16.merged())
    result = run_cli(bf16)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tensor", "rho", "noise", "expected", "inside", "outside"]
    assert [line.split()[0] for line in lines[1:4]] == [f"{m}.weight" for m in (UP, OUT_PROJ, Q)]
    assert lines[1].split()[1] == "adapted"
    assert lines[1].split()[-1] == "holds"
    assert lines[-2] == "untouched  2 of 2 tensors are the base's, byte for byte"
    assert lines[-1].startswith("verdict    holds, in ")
    assert result.stderr == ""


def test_the_command_names_what_does_not_hold_and_exits_with_3(bf16):
    bf16.save("merged", bf16.merged(2 * SCALE))
    result = run_cli(bf16)
    assert result.exit_code == 3
    for module in SHAPES:
        assert f"{module}.weight: merged twice" in result.stdout.splitlines()
    assert result.stderr == (
        f"error: {bf16.tmp / 'merged'}: {UP}.weight: merged twice, and 2 more do not hold. "
        "Merge again from the base.\n"
    )


def test_the_command_prints_json_alone(bf16):
    bf16.save("merged", bf16.merged(0))
    result = run_cli(bf16, "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 3
    assert facts["holds"] is False
    assert facts["tensors"][f"{Q}.weight"]["cause"] == "missing: the adapter is not in it"
    assert facts["tensors"]["model.norm.weight"]["role"] == "untouched"
    assert facts["total"]["wrong"] == 3
