"""What a training shows: nothing where it is piped, how it goes on a terminal, curves at its end."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread
from safetensors.torch import load_file

from lorasurgery.cli._training_view import Speed, clock, training_view
from lorasurgery.operations.inspecting import curves
from tests.test_training_cli import done, refused
from tests.training_case import TEXT, save_base

SHORT = ("--steps", 3, "--batch", 2, "--length", 48, "--rank", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("view") / "base")


def test_all_that_is_said_into_a_pipe(base, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text(TEXT.read_text()[:200])
    more = ("--eval-data", held, "--eval-every", 2)
    said = done("train", base, "--data", TEXT, "-o", tmp_path / "out", *SHORT, *more)
    rows = curves.read(tmp_path / "out" / "metrics.jsonl")
    loss = sum(row["loss"] for row in rows) / 3
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    table, _, rest = said.partition("\n\n")
    head, *lines = [line.split() for line in table.splitlines()]
    assert head == ["tensor", "‖ΔW‖"]
    assert lines == [[pattern, "x2", mean] for pattern, mean in norms(tmp_path / "out").items()]
    assert re.sub(r" in [\d.]+ s", " in some time", rest) == (
        "modules             14\n"
        "trained parameters  3712\n"
        "base parameters     32352\n"
        "groups              2\n"
        "steps               3\n"
        f"tokens              {rows[-1]['tokens']}\n"
        f"loss                {loss:.4g}\n"
        f"eval loss           {best['eval_loss']:.4g}\n"
        f"best step           {best['step']}\n"
        f"wrote {tmp_path}/out in some time\n"
    )
    assert done("train", base, "--data", TEXT, "-o", tmp_path / "two", *SHORT, "-q") == ""


def norms(folder: Path) -> dict[str, str]:
    """Of 2 B A, the mean over both layers."""
    held = load_file(folder / "adapter_model.safetensors")
    parts = [f"self_attn.{p}_proj" for p in "qkvo"]
    found = {}
    for part in [*parts, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]:
        names = [f"base_model.model.model.layers.{i}.{part}.lora_{{}}.weight" for i in range(2)]
        each = [float((2 * held[n.format("B")] @ held[n.format("A")]).norm()) for n in names]
        found[f"model.layers.{{0..1}}.{part}.weight"] = f"{sum(each) / 2:.4g}"
    return found


class Terminal(io.StringIO):
    """A stderr that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


TOLD = {"step": 3, "loss": 2.5, "tokens": 1200.0, "rate.A": 1e-3, "rate.B": 16e-3, "seconds": 0.5}


def drawn(monkeypatch, *, quiet=False, **env: str) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with training_view(quiet=quiet) as watch:
        watch({**TOLD, "step": 2, "tokens": 200.0}, 9)
        watch({**TOLD, "eval_loss": 2.75}, 9)
    return terminal.getvalue()


def test_a_terminal_sees_loss_rates_speed_memory_and_the_time_that_is_left(monkeypatch):
    seen = drawn(monkeypatch)
    assert "\x1b[9" in seen  # in colour
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", seen)
    # 1000 tokens in the half second of the step that was seen whole; six steps of half a second are left
    assert re.search(
        r"3/9 [━╸╺]+ +loss 2\.5000  held out 2\.7500  rate 0\.001/0\.016  2,000 tokens/s  [\d.]+ [MG]iB  "
        r"0:00:03 left",
        plain,
    ), plain


def test_no_color_is_honoured_and_quiet_is_quiet(monkeypatch):
    assert "\x1b[9" not in drawn(monkeypatch, NO_COLOR="1")
    assert drawn(monkeypatch, quiet=True) == ""


def test_a_run_that_was_resumed_counts_no_tokens_of_the_one_before():
    speed = Speed()
    speed.add({"step": 50, "tokens": 9000.0, "seconds": 2.0})
    assert speed.tokens == 0
    speed.add({"step": 51, "tokens": 9300.0, "seconds": 3.0})
    assert speed.tokens == 100
    assert speed.left(4) == 10
    assert clock(3725.4) == "1:02:05"


def test_curves_are_drawn_of_the_whole_run(base, tmp_path):
    out, file = tmp_path / "out", tmp_path / "picture.png"
    done("train", base, "--data", TEXT, "-o", out, *SHORT, "-q")
    assert imread(out / "curves.png").shape[2] == 4
    done("train", base, "--data", TEXT, "-o", out, *SHORT, "-q", "--resume", "--plot", file)
    assert file.read_bytes() == (out / "curves.png").read_bytes()
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.75}]
    assert curves.points(rows, "loss") == ([1, 2], [2.0, 1.5])
    assert curves.points(rows, "eval_loss") == ([2], [1.75])
    call = ("train", base, "--data", TEXT, "-o", tmp_path / "b", "--plot", tmp_path / "a.bmp")
    assert refused(*call) == (
        2,
        f"{tmp_path}/a.bmp: a picture ends with .png, .svg, .pdf. Rename it.",
    )


def test_json_is_json_alone(base, tmp_path):
    said = done("train", base, "--data", TEXT, "-o", tmp_path / "out", *SHORT, "--json")
    assert json.loads(said)["total"]["trained_parameters"] == 3712
