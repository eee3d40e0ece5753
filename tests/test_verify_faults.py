"""Verify: each planted fault is caught, and called by its name."""

import math

import pytest
import torch
from safetensors.torch import save_file
from verify_case import (
    ALPHA,
    EXPERTS,
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
)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def case(request, tmp_path):
    return Case(tmp_path, request.param)


@pytest.fixture
def bf16(tmp_path):
    return Case(tmp_path)


def zero_case(case):
    """Of one module the adapter is as training begins: B is 0."""
    a, b = case.factors[Q]
    case.factors[Q] = (a, 0 * b)
    case.write_adapter("zero", case.factors)
    return case.merged()


def test_no_merge_is_named(case):
    found = case.verify(case.base)
    assert causes(found) == all_modules("missing: the adapter is not in it")
    assert found.total["retained"] == pytest.approx(0, abs=1e-6)


def test_one_module_left_out_is_named(case):
    found = case.verify(case.merged(**{OUT_PROJ: 0}))
    assert causes(found) == {f"{OUT_PROJ}.weight": "missing: the adapter is not in it"}


def test_a_merge_done_twice_is_named(case):
    assert causes(case.verify(case.merged(2 * SCALE))) == all_modules("merged twice")


def test_a_subtracted_change_is_named(case):
    found = case.verify(case.merged(-SCALE))
    assert causes(found) == all_modules("subtracted instead of added")


def test_alpha_left_out_is_named(case):
    found = case.verify(case.merged(1 / RANK))
    assert causes(found) == all_modules("alpha 20 was left out")


def test_the_scale_left_out_is_named(case):
    found = case.verify(case.merged(1))
    assert causes(found) == all_modules("the scale 2.5 was left out")


def test_the_scale_applied_twice_is_named(case):
    found = case.verify(case.merged(SCALE**2))
    assert causes(found) == all_modules("the scale 2.5 was applied twice")


def test_plain_scaling_of_a_rank_stabilized_adapter_is_named(tmp_path):
    case = Case(tmp_path, config={"use_rslora": True}, scale=ALPHA / math.sqrt(RANK))
    found = case.verify(case.merged(ALPHA / RANK))
    cause = "scaled by alpha / r, not by rsLoRA's alpha / sqrt(r)"
    assert causes(found) == all_modules(cause)


def test_rank_stabilized_scaling_of_a_plain_adapter_is_named(case):
    found = case.verify(case.merged(ALPHA / math.sqrt(RANK)))
    cause = "scaled by alpha / sqrt(r) as if it were rsLoRA, not by alpha / r"
    assert causes(found) == all_modules(cause)


def test_an_ignored_alpha_pattern_is_named(tmp_path):
    case = Case(tmp_path)
    case.write_adapter("patterned", case.factors, alpha_pattern={"o_proj": 50})
    found = case.verify(case.merged(), ["patterned"])
    cause = "the adapter's common alpha and r were taken, not this module's"
    assert causes(found) == {f"{OUT_PROJ}.weight": cause}


def test_an_ignored_weight_is_named(bf16):
    found = bf16.verify(bf16.merged(), ["adapter:0.3"])
    assert causes(found) == all_modules("the weight 0.3 was left out")


def test_a_change_of_an_unusual_size_is_told_as_a_number(bf16):
    found = bf16.verify(bf16.merged(0.6 * SCALE))
    rho = by_name(found)[f"{Q}.weight"].rho
    assert rho == pytest.approx(0.6, abs=0.01)
    assert causes(found)[f"{Q}.weight"] == f"rho {rho:.3g} is of no usual mistake"


def test_a_turned_change_is_named(case):
    found = case.verify(case.merged(**{Q: case.delta(Q).T}))
    cause = "transposed: it is Dᵀ that was added (B and A swapped, or [in, out] for [out, in])"
    assert causes(found) == {f"{Q}.weight": cause}


def test_one_bit_of_an_untouched_tensor_is_seen(case):
    merged = case.merged()
    embedding = merged["model.embed_tokens.weight"].clone()
    bits = embedding.view(torch.int32 if case.dtype == torch.float32 else torch.int16)
    bits[17, 5] ^= 1
    found = case.verify({**merged, "model.embed_tokens.weight": embedding})
    cause = "changed in 1 of 4800 elements, though no adapter touches it"
    assert causes(found) == {"model.embed_tokens.weight": cause}


def test_one_element_of_an_adapted_tensor_is_seen(case):
    merged = case.merged()
    merged[f"{UP}.weight"] = merged[f"{UP}.weight"].clone()
    merged[f"{UP}.weight"][3, 4] *= 1.05
    assert list(causes(case.verify(merged))) == [f"{UP}.weight"]


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_foreign_noise_in_an_adapted_tensor_is_seen(case, share):
    """Noise of a fiftieth of the change, which is a fiftieth of W: a tenth of bfloat16's rounding."""
    noise = share * 0.05 * case.size * case.randn(160, 96).double()
    found = case.verify(case.merged(**{UP: case.delta(UP) + noise}))
    assert list(causes(found)) == [f"{UP}.weight"]
    assert abs(by_name(found)[f"{UP}.weight"].rho - 1) < 0.05


def test_a_second_adapter_is_seen_in_each_of_its_modules(case):
    other = {m: case.pair(*SHAPES[m]) for m in (Q, OUT_PROJ)}
    wrong = {m: case.delta(m) + SCALE * (b.double() @ a.double()) for m, (a, b) in other.items()}
    found = case.verify(case.merged(**wrong))
    assert sorted(causes(found)) == sorted(f"{m}.weight" for m in other)
    for cause in causes(found).values():
        assert "outside the adapter's subspace, of a rank about" in cause
        assert cause.endswith("another adapter, or another base")
    rank = int(causes(found)[f"{Q}.weight"].partition("about ")[2].partition(":")[0])
    assert 5 <= rank <= 2 * RANK


def test_one_of_two_adapters_left_out_is_named(bf16):
    bf16.write_adapter("other", {Q: bf16.pair(*SHAPES[Q])})
    found = bf16.verify(bf16.merged(), ["adapter", "other"])
    assert causes(found) == {f"{Q}.weight": f"{bf16.tmp / 'other'} is missing"}


def test_one_of_two_adapters_merged_twice_is_named(bf16):
    other = bf16.pair(*SHAPES[Q])
    bf16.write_adapter("other", {Q: other})
    d = bf16.delta(Q) + 2 * SCALE * (other[1].double() @ other[0].double())
    found = bf16.verify(bf16.merged(**{Q: d}), ["adapter", "other"])
    cause = causes(found)[f"{Q}.weight"].removeprefix(f"{bf16.tmp / 'other'} is in it ")
    assert 1.9 < float(cause.removesuffix(" times")) < 2.1


def test_missing_and_extra_tensors_are_named(case):
    merged = case.merged()
    merged["model.extra.weight"] = merged.pop("model.norm.weight")
    found = case.verify(merged)
    assert causes(found) == {
        "model.extra.weight": "extra: the base has no such tensor",
        "model.norm.weight": "missing: the base has it",
    }


def test_another_shape_is_named(case):
    merged = case.merged()
    merged["model.norm.weight"] = merged["model.norm.weight"][:90]
    assert causes(case.verify(merged)) == {"model.norm.weight": "is [90], but [96] in the base"}


def test_nan_in_an_adapted_tensor_is_named(case):
    merged = case.merged()
    merged[f"{Q}.weight"][2, 3] = torch.nan
    assert causes(case.verify(merged)) == {f"{Q}.weight": "nan or inf in it"}


def test_saved_modules_left_out_are_named(bf16):
    bf16.write_adapter("saved", bf16.factors, {"model.norm.weight": bf16.randn(96)}, modules_to_save=["norm"])  # fmt: skip
    found = bf16.verify(bf16.merged(), ["saved"])
    cause = "missing: it is the base's, not the adapter's"
    assert causes(found) == {"model.norm.weight": cause}


def test_one_bit_is_seen_where_the_adapter_is_zero(bf16):
    merged = zero_case(bf16)
    merged[f"{Q}.weight"].view(torch.int16)[3, 4] ^= 1
    cause = "changed in 1 elements, though the adapter's change is 0"
    assert causes(bf16.verify(merged, ["zero"])) == {f"{Q}.weight": cause}


@pytest.mark.parametrize(("times", "cause"), [(1, None), (0, "missing: the adapter is not in it")])
def test_added_biases_are_checked(tmp_path, times, cause):
    case = Case(tmp_path)
    bias, more = (0.1 * case.randn(96)).bfloat16(), 0.01 * case.randn(96)
    save_file({**case.base, f"{OUT_PROJ}.bias": bias}, tmp_path / "base" / "model.safetensors")
    case.write_adapter("biased", case.factors, {f"{OUT_PROJ}.lora_B.bias": more}, lora_bias=True)
    wanted = (bias.double() + times * SCALE * more.double()).bfloat16()
    found = case.verify({**case.merged(), f"{OUT_PROJ}.bias": wanted}, ["biased"])
    assert by_name(found)[f"{OUT_PROJ}.bias"].role == "added"
    assert causes(found) == ({f"{OUT_PROJ}.bias": cause} if cause else {})


COUNT, OUT, IN = 3, 40, 24


def experts(case, order):
    """A stack [experts, out, in] whose change is read from the factors in some order."""
    a, b = case.randn(COUNT * RANK, IN), 2e-4 * case.randn(OUT, COUNT * RANK)
    base = (0.05 * case.randn(COUNT, OUT, IN)).to(case.dtype)
    name = f"{EXPERTS}.down_proj"
    save_file({name: base}, case.tmp / "base" / "model.safetensors")
    case.write_adapter(
        "stacked", {EXPERTS: (a, b)}, target_modules=[], target_parameters=["experts.down_proj"]
    )
    # in A the expert varies slowest, in B fastest
    right_a, right_b = a.view(COUNT, RANK, IN), b.view(OUT, RANK, COUNT).permute(2, 0, 1)
    a, b = {
        "right": (right_a, right_b),
        "B slowest": (right_a, b.view(OUT, COUNT, RANK).permute(1, 0, 2)),
        "A fastest": (a.view(RANK, COUNT, IN).permute(1, 0, 2), right_b),
        "shifted": (right_a.roll(1, 0), right_b.roll(1, 0)),
    }[order]
    merged = (base.double() + SCALE * (b.double() @ a.double())).to(case.dtype)
    return case.verify({name: merged}, ["stacked"])


@pytest.mark.parametrize(
    ("order", "cause"),
    [
        ("right", None),
        ("B slowest", "B was read with the expert slowest; it varies fastest"),
        ("A fastest", "A was read with the expert fastest; it varies slowest"),
        ("shifted", "they are shifted by 1 of 3"),
    ],
)
def test_the_order_of_experts_is_checked(case, order, cause):
    whole = f"in another order of experts: {cause}"
    assert causes(experts(case, order)) == ({f"{EXPERTS}.down_proj": whole} if cause else {})
