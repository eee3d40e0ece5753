"""lorasurgery train as it is typed, and what evaluate and generate make of its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorasurgery.cli.app import app
from tests.training_case import TEXT, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("train-cli") / "base")


def surgery(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> str:
    result = surgery(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object) -> tuple[int, str]:
    result = surgery(*arguments)
    assert isinstance(result.exception, SystemExit)
    return result.exit_code, result.stderr.strip().replace("error: ", "")


SHORT = ("--steps", 3, "--batch", 2, "--length", 48, "--rank", 4, "--device", "cpu")


def test_groups_are_explained_with_their_rates(base, tmp_path):
    flags = ("--method", "lora+", "--ratio", 8, "--lr", 1e-4, "--explain-optimizer")
    said = done("train", base, "--data", TEXT, "-o", tmp_path / "out", *flags, *SHORT)
    assert said.splitlines()[-3:] == [
        "group  tensors  parameters  learning rate  weight decay",
        "A           14        1920         0.0001             0",
        "B           14        1792         0.0008             0",
    ]
    assert f"wrote {tmp_path}/out in " in said


def test_lora_plus_takes_magnitudes_and_heads_at_the_rate_of_a(base, tmp_path):
    flags = (
        "--method",
        "lora+",
        "--dora",
        "--modules-to-save",
        "lm_head",
        "--lr",
        1e-4,
        "--explain-optimizer",
    )
    said = done("train", base, "--data", TEXT, "-o", tmp_path / "out", *flags, *SHORT)
    rows = [line.split() for line in said.splitlines()[-5:]]
    assert [(row[0], float(row[3])) for row in rows[1:]] == [
        ("A", 1e-4), ("B", 1.6e-3), ("magnitude", 1e-4), ("head", 1e-4),
    ]  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] is True


def test_a_ratio_below_1_is_done_and_remarked(base, tmp_path):
    call = ("train", base, "--data", TEXT, "-m", "lora+", *SHORT, "--ratio")
    half = surgery(*call, 0.5, "-o", tmp_path / "half")
    assert half.exit_code == 0
    assert half.stderr == (
        "note: --ratio: is below 1, so that B learns more slowly than A: LoRA+ is the opposite.\n"
    )
    assert surgery(*call, 2, "-o", tmp_path / "two").stderr == ""


def test_a_dry_run_counts_and_writes_nothing(base, tmp_path):
    said = done("train", base, "--data", TEXT, "--dry-run", "--json", "--method", "dora", *SHORT)
    total = json.loads(said)["total"]
    # A, B, and a magnitude for each output
    assert total["trained_parameters"] == 1920 + 1792 + 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert total["groups"] == 3
    assert list(tmp_path.iterdir()) == []


def test_options_come_from_a_file_and_flags_win(base, tmp_path):
    config = {"data": [str(TEXT)], "steps": 2, "rank": 3, "length": 48, "lr": 0.01, "device": "cpu"}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config))
    said = done("train", base, "-c", file, "-o", tmp_path / "out", "--rank", 5, "--json")
    assert json.loads(said)["total"]["steps"] == 2
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5
    file.write_text(json.dumps({**config, "ranck": 3}))
    code, said = refused("train", base, "-c", file, "-o", tmp_path / "again")
    assert code == 2
    assert f"{file}: no option 'ranck'. Did you mean 'rank'?" in " ".join(said.split())


def test_a_flag_of_another_method_is_refused(base, tmp_path):
    call = ("train", base, "--data", TEXT, "-o", tmp_path / "out", "--ratio", 4)
    assert refused(*call) == (2, "--ratio: means nothing to lora. It belongs to lora+.")
    call = ("train", base, "--data", TEXT, "-o", tmp_path / "out", "-m", "lora-fs")
    assert refused(*call) == (1, "--method lora-fs: no method. Did you mean 'lora-fa'?")


UNMEANT = {
    ("--lr", "-1"): "--lr -1: is out of range. Pass 0 or more, below inf.",
    ("--lr", "inf"): "--lr inf: is out of range. Pass 0 or more, below inf.",
    ("--epochs", "nan"): "--epochs nan: is out of range. Pass 0 or more, below inf.",
    ("--warmup", "-3"): "--warmup -3: is out of range. Pass 0 or more, below inf.",
    ("--weight-decay", "nan"): "--weight-decay nan: is out of range. Pass 0 or more, below inf.",
    ("--beta2", "1"): "--beta2 1: is out of range. Pass 0 or more, below 1.",
    ("--alpha", "nan"): "--alpha nan: is out of range. Pass 0 or more, below inf.",
    ("--seed", "-1"): "--seed -1: is out of range. Pass 0 or more, below 9.22337e+18.",
    ("--eval-data", "/nowhere"): "/nowhere: no such file or directory. Check the path of --eval-data.",
    ("--dialect", "nope"): "dialects: no 'nope'. Did you mean 'peft'?",
    ("--layers", "99"): "--target-modules: no module in layers 99 is named by all-linear. Known: down_proj, "
    "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
    ("--target-modules", "("): "--target-modules (: is no name and no regular expression (missing ), unterminated "
    "subpattern at position 0). Mend it.",
    ("-m", "moral", "--experts", "0"): "--experts 0: is no number of experts. Pass 1 or more.",
}  # fmt: skip


@pytest.mark.parametrize("flags", UNMEANT, ids=" ".join)
def test_what_cannot_be_meant_is_one_line_before_the_first_step(base, tmp_path, flags):
    _, said = refused("train", base, "--data", TEXT, "-o", tmp_path / "out", *SHORT, *flags)
    assert said == UNMEANT[flags]
    assert list(tmp_path.iterdir()) == []


def test_data_must_be_given_and_be_there(base, tmp_path):
    code, _ = refused("train", base, "-o", tmp_path / "out")
    assert code == 2
    nowhere = tmp_path / "nowhere.txt"
    assert refused("train", base, "--data", nowhere, "-o", tmp_path / "out") == (
        1, f"{nowhere}: no such file or directory. Check the path of --data.",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_an_adapter_beside_its_base_is_evaluated_like_the_merged_model(base, tmp_path, method):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:400])
    flags = ("--method", method, "--lr", 0.05)
    done("train", base, "--data", TEXT, "-o", adapter, *SHORT, *flags)
    done("merge", base, adapter, "-o", merged)

    def evaluated(*call: object) -> Any:
        return json.loads(done("evaluate", *call, "--text", text, "--json"))

    found = evaluated(base, merged, "--adapter", adapter)
    assert found["model"] == f"{base} + {adapter}"
    assert found["divergence"] < 1e-7
    assert found["agreement"] == 1.0
    plain = evaluated(base, merged)
    assert plain["divergence"] > 1e-5
    prompt = ("The files", "--tokens", 12, "--json")
    one = json.loads(done("generate", base, *prompt, "--adapter", adapter))["answers"]
    two = json.loads(done("generate", merged, *prompt))["answers"]
    assert one == two


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_evaluated(base, tmp_path):
    adapter, other = tmp_path / "adapter", save_base(tmp_path / "other", hidden_size=64)
    done("train", base, "--data", TEXT, "-o", adapter, *SHORT, "--target-modules", "up_proj")
    code, said = refused("evaluate", other, "--adapter", adapter, "--text", TEXT)
    where = "model.layers.0.mlp.up_proj"
    assert (code, said) == (1, (
        f"{adapter}: {where}: A [4, 32] and B [48, 4] make a change of [48, 32], but {where}.weight in "
        f"{other} is [48, 64] (1 more like it: base_model.model.model.layers.1.mlp.up_proj.lora_A.weight). "
        "Mend it, or leave it out with --allow-unmatched "
        f"'base_model.model.{where}.lora_A.weight'."
    ))  # fmt: skip


def test_metrics_and_report_say_what_was_done(base, tmp_path):
    out: Path = tmp_path / "out"
    done("train", base, "--data", TEXT, "-o", out, *SHORT, "--warmup", 1, "--schedule", "cosine")
    said = json.loads((out / "surgery.json").read_text())
    assert said["settings"]["pace"]["schedule"] == "cosine"
    assert said["settings"]["wanted"]["rank"] == 4
    assert said["inputs"] == {"base": str(base), "data0": str(TEXT)}
    assert said["base"] == str(base)
    done("merge", base, out, "-o", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "surgery.json").read_text())
    assert said["base_fingerprint"] == merged["base_fingerprint"]
    assert said["base_fingerprint"].startswith("blake3:")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "grad_norm", "tokens", "rate", "seconds"} == set(rows[0])


def test_qlora_packs_a_base_or_takes_a_packed_one_and_its_adapter_is_evaluated_beside_it(
    base, tmp_path
):
    done("quantize", base, "-o", tmp_path / "nf4")
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:400])
    flags = ("--lr", 0.05, "--qlora", "--json")
    now = done("train", base, "--data", TEXT, "-o", tmp_path / "now", *SHORT, *flags)
    before = done(
        "train", tmp_path / "nf4", "--data", TEXT, "-o", tmp_path / "then", *SHORT, *flags
    )
    one, two = (json.loads(said)["total"] for said in (now, before))
    assert one == two
    assert json.loads((tmp_path / "now" / "surgery.json").read_text())["settings"]["machine"]["nf4"] == {
        "block": 64, "double": True, "extra": {},
    }  # fmt: skip
    done("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain")
    done("merge", tmp_path / "plain", tmp_path / "now", "-o", tmp_path / "merged")
    call = ("evaluate", tmp_path / "nf4", tmp_path / "merged", "--adapter", tmp_path / "then")
    found = json.loads(done(*call, "--text", text, "--json"))
    assert found["divergence"] < 1e-7
    call = ("train", base, "--data", TEXT, "-o", tmp_path / "no", "--qlora", "--block-size", 60)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert refused(*call, *SHORT) == (1, (
        f"{name}: block size 60 is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096. Pass one of them as "
        "--block-size."
    ))  # fmt: skip


def test_the_budget_of_paged_state_is_a_size(base, tmp_path):
    flags = ("--optimizer", "paged-adamw", "--state-budget", "8KiB")
    done("train", base, "--data", TEXT, "-o", tmp_path / "out", *SHORT, *flags)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    # 3712 parameters of 8 bytes in pages of 2 KiB, 4 of which stay
    assert [row["pages_fetched"] for row in rows] == [0, 11, 11]
    assert [row["pages_written"] for row in rows] == [11, 11, 11]
    code, said = refused("train", base, "--data", TEXT, "-o", tmp_path / "no", *flags[:3], "lots")
    assert code == 2
    assert "'lots' is no size. Write it as 512MB or 2GiB." in " ".join(said.split())
