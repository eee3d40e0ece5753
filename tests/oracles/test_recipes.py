"""The recipes whose results are committed run, on a small decoder, and say what is so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from decoders import WORDS, make_decoder

from benchmarks import exports, greedy
from lorasurgery.operations.running import by_transformers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("recipes") / "base")


def test_the_table_of_exports_is_made_on_a_small_decoder_too(decoder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS[(7 * i * i + i) % 61] for i in range(40)))
    command = [sys.executable, "-m", "benchmarks.exports", decoder, "--only", "NF4", "--text", text]
    places = ["--scratch", tmp_path, "--output", tmp_path / "out.json"]
    done = subprocess.run(
        [*command, *places], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    base, nf4 = found["rows"]
    assert (base["name"], base["divergence"], base["runtime"]) == ("base", None, "transformers")
    assert (nf4["name"], nf4["runtime"]) == ("NF4", "transformers")
    assert 0 < nf4["divergence"] < 5
    assert nf4["mib"] < base["mib"]
    assert f"| NF4 | transformers | {nf4['perplexity']:.3f} |" in done.stdout
    # without graphs there is nothing to be held to a peer
    assert found["greedy"] == {}


def test_greedy_texts_are_told_apart_with_the_gap(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "PROMPTS", ("w5 w9", "w17 w3 w40"))
    one = by_transformers.load(decoder)
    other = by_transformers.load(make_decoder(tmp_path / "other", 1))
    for found in greedy.compare(one, one):
        assert found["same"] == found["made"]
        assert "gap" not in found
    for found in greedy.compare(one, other):
        assert found["same"] < found["made"]
        assert found["gap"] > 0


def test_rows_of_the_committed_table_are_all_that_the_recipe_makes() -> None:
    found = json.loads(exports.RESULT.read_text())
    assert found["text"] == exports.TEXT.name
    assert [row["name"] for row in found["rows"]] == ["base", *exports.EXPORTS]
    assert any("bitsandbytes" in name for name in found["greedy"])
