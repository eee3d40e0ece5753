"""Verify, on small merges made with torch alone: right ones hold, and each fault is caught by its name."""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from lorasurgery.codec import CodecOptions
from lorasurgery.errors import MatchError, VerificationError
from lorasurgery.operations.quantize import QuantizeOptions, quantize
from lorasurgery.operations.verify import VerifyOptions, insist, verify
from lorasurgery.surgery import RunOptions

Q, OUT_PROJ, UP, EXPERTS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.experts",
)
# out x in; q is square, so that it can be turned without anyone noticing
SHAPES = {Q: (96, 96), OUT_PROJ: (96, 80), UP: (160, 96)}
RANK, ALPHA = 8, 20.0
SCALE = ALPHA / RANK
OTHERS = {"model.embed_tokens.weight": (50, 96), "model.norm.weight": (96,)}


@dataclass
class Case:
    """A base, an adapter in PEFT's layout, and what a merge of them must hold, all float64."""

    tmp: object
    dtype: torch.dtype = torch.bfloat16
    config: dict = field(default_factory=dict)
    size: float = 0.02  # of the change, relative to W
    scale: float = SCALE
    seed: int = 0

    def __post_init__(self):
        self.rng = torch.Generator().manual_seed(self.seed)
        names = {f"{m}.weight": s for m, s in SHAPES.items()} | OTHERS
        self.base = {n: (0.05 * self.randn(*s)).to(self.dtype) for n, s in names.items()}
        self.factors = {m: self.pair(*s) for m, s in SHAPES.items()}
        self.save("base", self.base)
        self.write_adapter("adapter", self.factors)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.rng)

    def pair(self, out, in_):
        """B A has an element's root mean square of 0.05 size / scale."""
        return self.randn(RANK, in_), 0.05 * self.size / self.scale / math.sqrt(RANK) * self.randn(
            out, RANK
        )

    def delta(self, module, scale=None):
        a, b = self.factors[module]
        return (self.scale if scale is None else scale) * (b.double() @ a.double())

    def merged(self, scale=None, **changed):
        """W + D, rounded once; `changed` are other tensors by the name of a module."""
        out = dict(self.base)
        for module in SHAPES:
            delta = changed.get(module, self.delta(module, scale))
            w = self.base[f"{module}.weight"]
            out[f"{module}.weight"] = (w.double() + delta).to(w.dtype)
        return out

    def save(self, name, tensors, **config):
        folder = self.tmp / name
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def write_adapter(self, name, factors, extra=None, **config):
        folder = self.tmp / name
        folder.mkdir()
        modules = sorted(m.rpartition(".")[2] for m in factors)
        plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
        config = {**plain, **self.config, **config}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        keys = {}
        for module, (a, b) in factors.items():
            keys[f"base_model.model.{module}.lora_A.weight"] = a
            keys[f"base_model.model.{module}.lora_B.weight"] = b
        keys |= {f"base_model.model.{n}": t for n, t in (extra or {}).items()}
        save_file(
            {k: v.contiguous() for k, v in keys.items()}, folder / "adapter_model.safetensors"
        )
        return folder

    def verify(self, tensors, adapters=("adapter",), **options):
        folder = self.save("merged", tensors)
        texts = [str(self.tmp / a) for a in adapters]
        return verify(folder, self.tmp / "base", texts, VerifyOptions(**options))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def case(request, tmp_path):
    return Case(tmp_path, request.param)


@pytest.fixture
def bf16(tmp_path):
    return Case(tmp_path)


def by_name(found):
    return {f.tensor: f for f in found.findings}


def causes(found):
    return {f.tensor: f.cause for f in found.wrong}


def all_modules(cause):
    return {f"{m}.weight": cause for m in SHAPES}


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


def test_a_merge_whose_delta_was_rounded_first_holds(bf16):
    merged = bf16.merged()
    for module in SHAPES:
        a, b = bf16.factors[module]
        product = (b @ a).bfloat16() * SCALE
        merged[f"{module}.weight"] = bf16.base[f"{module}.weight"] + product
    assert bf16.verify(merged).holds


def test_a_merge_to_another_dtype_holds(bf16):
    merged = {n: t.float() for n, t in bf16.base.items()}
    for module in SHAPES:
        merged[f"{module}.weight"] = (
            merged[f"{module}.weight"].double() + bf16.delta(module)
        ).float()
    found = bf16.verify(merged)
    assert found.holds, causes(found)
    assert found.total["noise"] < 1e-4


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


def test_two_adapters_hold_with_their_weights(case):
    other = {Q: case.pair(*SHAPES[Q])}
    case.write_adapter("other", other)
    a, b = other[Q]
    both = 0.5 * case.delta(Q) + 2 * SCALE * (b.double() @ a.double())
    merged = case.merged(0.5 * SCALE, **{Q: both})
    assert case.verify(merged, ["adapter:0.5", "other:2"]).holds


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


def test_saved_modules_are_the_adapters_own(bf16):
    new = bf16.randn(96)
    extra = {"model.norm.weight": new}
    bf16.write_adapter("saved", bf16.factors, extra, modules_to_save=["norm"])
    merged = {**bf16.merged(), "model.norm.weight": new.bfloat16()}
    found = bf16.verify(merged, ["saved"])
    assert found.holds
    assert by_name(found)["model.norm.weight"].role == "replaced"


def test_saved_modules_left_out_are_named(bf16):
    bf16.write_adapter("saved", bf16.factors, {"model.norm.weight": bf16.randn(96)}, modules_to_save=["norm"])  # fmt: skip
    found = bf16.verify(bf16.merged(), ["saved"])
    cause = "missing: it is the base's, not the adapter's"
    assert causes(found) == {"model.norm.weight": cause}


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


def test_an_adapter_part_without_a_place_is_refused_before_anything_is_read(bf16):
    bf16.write_adapter("lost", {"model.layers.7.self_attn.q_proj": bf16.factors[Q]})
    with pytest.raises(MatchError, match=r"model\.layers\.7\.self_attn\.q_proj\.weight is adapted"):
        bf16.verify(bf16.merged(), ["lost"])


def nf4(path, out):
    quantize(path, out, QuantizeOptions(CodecOptions(64, double=True)), RunOptions())


def decode(stored, name):
    """NF4 by its formula: map[code] times the scale of its 64, itself map[code] times scale plus offset."""
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    scale = stored[f"{name}.nested_quant_map"][stored[f"{name}.absmax"].long()]
    scale = scale * stored[f"{name}.nested_absmax"].repeat_interleave(256)[: len(scale)]
    q = stored[name].flatten()
    codes = torch.stack((q >> 4, q & 15), 1).flatten().long()
    w = stored[f"{name}.quant_map"][codes] * (scale + state["nested_offset"]).repeat_interleave(64)
    return w.view(state["shape"]).bfloat16()


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


def test_a_requantized_merge_holds_only_if_the_change_is_kept(quantized):
    quantized.save("sixteen", quantized.merged())
    nf4(quantized.tmp / "sixteen", quantized.tmp / "m")
    found = verify(
        quantized.tmp / "m",
        quantized.tmp / "base",
        [str(quantized.tmp / "adapter")],
        VerifyOptions(),
    )
    large = quantized.size == 0.3
    assert not found.wrong, causes(found)
    assert found.min_retained == 0.9
    assert found.holds == large
    assert (found.total["retained"] > 0.9) == large


def test_a_requantized_merge_done_twice_is_named(quantized):
    if quantized.size != 0.3:  # what rounding eats at 0.01 nobody can see
        quantized.save("sixteen", quantized.merged())
        nf4(quantized.tmp / "sixteen", quantized.tmp / "m")
    else:
        quantized.save("sixteen", quantized.merged(2 * SCALE))
        nf4(quantized.tmp / "sixteen", quantized.tmp / "m")
    found = verify(
        quantized.tmp / "m",
        quantized.tmp / "base",
        [str(quantized.tmp / "adapter")],
        VerifyOptions(),
    )
    assert not found.holds
    if quantized.size == 0.3:
        assert causes(found) == all_modules("merged twice")


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
