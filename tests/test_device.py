"""--device: an operation that computes on a GPU writes the bytes that it writes on the processor.

Without a GPU its Triton kernels are launched over the processor's memory, by Triton's interpreter.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from merge_files import surgery
from outputs import tree
from safetensors.numpy import save_file

from lorasurgery import device
from lorasurgery.change import Given
from lorasurgery.checkpoint import MANIFEST
from lorasurgery.codec import CodecOptions
from lorasurgery.device import HOST, Gpu, opened
from lorasurgery.errors import UsageError
from lorasurgery.kernels import _operator, nf4_quantize
from lorasurgery.operations.dequantize import dequantize
from lorasurgery.operations.merge import MergeOptions, merge
from lorasurgery.operations.merging.edits import Rounding
from lorasurgery.operations.merging.requantize import POLICIES
from lorasurgery.operations.quantize import QuantizeOptions, quantize
from lorasurgery.output import OutputOptions
from lorasurgery.surgery import RunOptions

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
BLOCK, RANK, ALPHA = 32, 3, 5.0
# several tiles; rows that end inside of a block, inside of a byte
SHAPES = {"up_proj": (45, 96), "q_proj": (33, 48), "k_proj": (7, 9)}
TILE = 1 << 12


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels whose forms for GPUs were called."""
    found = set()

    def launch(_cpu, gpu, *args):
        found.add(gpu.__module__.rpartition(".")[2])
        assert gpu.__name__ == "launch"
        return gpu(*args)

    monkeypatch.setattr(_operator, "dispatch", launch)
    return found


def gpu():
    """The one that is here, or this memory in its stead; its tiles are not the processor's."""
    place = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Gpu("cuda:0", TILE, place=place)


def name(module):
    return f"model.layers.0.{module}.weight"


def base(folder, kind=ml_dtypes.bfloat16):
    folder.mkdir()
    rng = np.random.default_rng(0)
    drawn = {name(m): 0.02 * rng.standard_normal(s) for m, s in SHAPES.items()}
    drawn["model.norm.weight"] = rng.standard_normal(9)
    held = {n: w.astype(kind) for n, w in drawn.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def adapter(folder, **fields):
    folder.mkdir()
    rng, held = np.random.default_rng(1), {}
    for module, (out, in_) in SHAPES.items():
        at = f"base_model.model.{name(module).removesuffix('.weight')}"
        held[f"{at}.lora_A.weight"] = rng.standard_normal((RANK, in_)).astype(np.float32)
        held[f"{at}.lora_B.weight"] = 1e-3 * rng.standard_normal((out, RANK)).astype(np.float32)
        if fields.get("use_dora"):
            m = 0.02 * in_**0.5 * (1 + 0.1 * rng.standard_normal(out))
            held[f"{at}.lora_magnitude_vector"] = m.astype(np.float32)
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


def packed(folder, *, double=False):
    source = base(folder.with_name(f"{folder.name}-base"))
    quantize(source, folder, QuantizeOptions(CodecOptions(BLOCK, double)), RunOptions())
    return folder


def how(where, **output):
    return RunOptions(OutputOptions(**output), threads=2, device=where)


def numbers(found):
    """A manifest's sums and errors, which depend on the order of summation in their last digits."""
    totals = [found.pop("total"), *(t.pop("metrics") for t in found["tensors"].values())]
    return [pytest.approx(total, rel=1e-5, abs=1e-12) for total in totals]


def same(out, on_gpu):
    """All bytes of two outputs, but for their manifests' seconds, devices and last digits."""
    ours, theirs = tree(out), tree(on_gpu)
    one, other = (json.loads(files.pop(MANIFEST)) for files in (ours, theirs))
    assert ours == theirs
    assert len(ours) > 1
    assert (one.pop("device"), other.pop("device")) == ("cpu", "cuda:0")
    assert [n.expected for n in numbers(one)] == numbers(other)
    assert one.pop("seconds") >= 0 <= other.pop("seconds")
    assert one == other


def on_both(tmp_path, operation):
    """What the operation writes on the processor, and on the GPU."""
    folders = tmp_path / "cpu", tmp_path / "gpu"
    for folder, where in zip(folders, (HOST, gpu()), strict=True):
        operation(folder, how(where))
    same(*folders)


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_writes_the_same_bytes(tmp_path, launched, kind, double):
    source = base(tmp_path / "base", KINDS[kind])
    options = QuantizeOptions(CodecOptions(BLOCK, double))
    on_both(tmp_path, lambda out, run: quantize(source, out, options, run))
    assert launched == {"nf4_quantize", "nf4_error"}


@pytest.mark.parametrize("dtype", [None, "F16", "F32"])
def test_dequantize_writes_the_same_bytes(tmp_path, launched, dtype):
    source = packed(tmp_path / "nf4", double=True)
    on_both(tmp_path, lambda out, run: dequantize(source, out, dtype, run))
    assert launched == {"nf4_dequantize"}


@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_writes_the_same_bytes(tmp_path, launched, kind, seed):
    source, lora = base(tmp_path / "base", KINDS[kind]), adapter(tmp_path / "lora")
    options = MergeOptions(rounding=Rounding(seed))
    on_both(tmp_path, lambda out, run: merge(source, [str(lora)], out, options, run))
    assert launched == {"lora_merge"}


def test_a_merge_out_of_nf4_writes_the_same_bytes(tmp_path, launched):
    source, lora = packed(tmp_path / "nf4"), adapter(tmp_path / "lora")
    on_both(tmp_path, lambda out, run: merge(source, [str(lora)], out, MergeOptions(), run))
    assert launched == {"nf4_dequantize", "lora_merge"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_merge_into_nf4_writes_the_same_bytes_and_the_same_undo_file(tmp_path, launched, policy):
    source, lora = packed(tmp_path / "nf4", double=True), adapter(tmp_path / "lora")

    def merged(out, run):
        options = MergeOptions(
            policy=policy, rounding=Rounding(5 if policy == "stochastic" else None), min_retained=0,
            original=tmp_path / "nf4-base" if policy == "from-original" else None,
            undo=tmp_path / "undo", rank=2,
        )  # fmt: skip
        merge(source, [str(lora)], out, options, run)
        (tmp_path / "undo").replace(out.with_name(f"{out.name}.undo"))

    on_both(tmp_path, merged)
    assert (tmp_path / "cpu.undo").read_bytes() == (tmp_path / "gpu.undo").read_bytes()
    assert {"nf4_dequantize"} < launched


@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "stochastic"])
def test_a_dora_s_merge_writes_the_same_bytes(tmp_path, launched, seed):
    source, dora = base(tmp_path / "base"), adapter(tmp_path / "dora", use_dora=True)
    options = MergeOptions(rounding=Rounding(seed))
    on_both(tmp_path, lambda out, run: merge(source, [str(dora)], out, options, run))
    assert launched == {"dora_merge"}


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("seed", [None, 5])
def test_a_change_that_no_factors_make_is_rounded_to_the_same_bits(seed):
    w, d = (drawn.astype(np.float32) for drawn in np.random.default_rng(2).normal(size=(2, 13, 7)))
    for kind in KINDS.values():
        call = w.astype(kind), np.dtype(kind), seed, 3
        ours, theirs = (Given(d).merge(*call, where) for where in (HOST, gpu()))
        assert ours[0].tobytes() == theirs[0].tobytes()
        assert ours[1:] == theirs[1:]


def full(*_):
    raise torch.OutOfMemoryError


@pytest.mark.usefixtures("launched")
def test_a_gpu_without_memory_is_one_line_and_the_processor_goes_on(tmp_path, monkeypatch):
    source, nf4 = base(tmp_path / "base"), tmp_path / "nf4"
    options = QuantizeOptions(CodecOptions(BLOCK))
    calls, launch = [], nf4_quantize.launch

    def second(*args):
        calls.append(args)
        return (full if len(calls) > 2 else launch)(*args)

    second.__module__, second.__name__ = launch.__module__, "launch"
    with monkeypatch.context() as patched:
        patched.setattr(nf4_quantize, "launch", second)
        with pytest.raises(UsageError) as error:
            quantize(source, nf4, options, how(gpu()))
    assert str(error.value) == (
        "--device cuda:0: the GPU has no memory left for a tile of nf4_quantize. End what else runs "
        "there, pass --max-memory for smaller tiles, or leave --device out."
    )
    assert not nf4.exists()
    report = quantize(source, nf4, options, how(HOST, resume=True))
    assert report.device == "cpu"
    quantize(source, tmp_path / "gpu", options, how(gpu()))
    same(nf4, tmp_path / "gpu")


COMMANDS = {
    "quantize": ("base", "--block-size", BLOCK),
    "dequantize": ("nf4",),
    "merge": ("base", "lora", "--min-retained", 0),
}


@pytest.fixture
def inputs(tmp_path):
    packed(tmp_path / "nf4", double=True)
    base(tmp_path / "base")
    adapter(tmp_path / "lora")
    return tmp_path


def call(command, folder, *flags):
    """Words that are files' names are those files."""
    words = [folder / w if isinstance(w, str) and w.isalnum() else w for w in COMMANDS[command]]
    return surgery(command, *words, "-o", folder / "out", *flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_on_which_device_it_ran(inputs, launched, monkeypatch, command):
    asked = []
    monkeypatch.setattr(device, "opened", lambda name: asked.append(name) or gpu())
    done = call(command, inputs, "--device", "cuda:0", "--report", inputs / "report.json")
    assert done.exit_code == 0, done.output
    assert asked == ["cuda:0"]
    assert done.stdout.splitlines()[-1].endswith(" s on cuda:0")
    for file in (inputs / "report.json", inputs / "out" / MANIFEST):
        assert json.loads(file.read_text())["device"] == "cuda:0"
    assert launched


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_word_about_it_the_processor_computes(inputs, command):
    done = call(command, inputs, "--report", inputs / "report.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].endswith(" s")
    for file in (inputs / "report.json", inputs / "out" / MANIFEST):
        assert json.loads(file.read_text())["device"] == "cpu"


def machine(monkeypatch, *, cuda="12.8", gpus=0, triton=True):
    """What torch and Python would say of another machine."""
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(device, "find_spec", lambda _: "found" if triton else None)


ABSENT = {
    "gpu": ({}, "unknown. Name cpu, cuda, or cuda:N for the GPU of that number."),
    "cuda:-1": ({}, "unknown. Name cpu, cuda, or cuda:N for the GPU of that number."),
    "cuda": (
        {"cuda": None},
        "torch 2.9.1 is built without CUDA. Install a build that has it, or leave --device out: the "
        "processor writes the same bytes.",
    ),
    "cuda:0": (
        {},
        "torch 2.9.1, built for 12.8, finds no GPU or no driver for it. See what nvidia-smi says, or leave "
        "--device out: the processor writes the same bytes.",
    ),
    "cuda:1": (
        {"gpus": 2, "triton": False},
        "Triton is not installed. Install it, or leave --device out: the processor writes the same bytes.",
    ),
    "cuda:7": ({"gpus": 2}, "there are 2 GPUs, and the last is cuda:1. Name one of them."),
}  # fmt: skip


@pytest.mark.parametrize("asked", ABSENT)
def test_a_device_that_is_not_here_is_one_line_before_anything_is_written(
    inputs, monkeypatch, asked
):
    facts, message = ABSENT[asked]
    machine(monkeypatch, **facts)
    before = tree(inputs)
    for command in COMMANDS:
        done = call(command, inputs, "--device", asked)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr == f"error: --device {asked}: {message}\n"
    assert tree(inputs) == before


def test_a_gpu_is_named_by_its_number(monkeypatch):
    machine(monkeypatch, gpus=2)
    assert opened("cpu") is HOST
    assert opened("cuda").name == "cuda:0"
    second = opened("cuda:1")
    assert (second.name, second.place) == ("cuda:1", torch.device("cuda", 1))
    # a launch goes to the GPU that is current in the thread
    assert second._current().idx == 1


@pytest.mark.parametrize(("command", "file"), [("quantize", "m.onnx"), ("merge", "m.onnx")])
def test_a_graph_takes_no_device(tmp_path, monkeypatch, command, file):
    machine(monkeypatch, gpus=1)
    (tmp_path / file).touch()
    more = (tmp_path,) if command == "merge" else ()
    done = surgery(command, tmp_path / file, *more, "-o", tmp_path / "out", "--device", "cuda")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: --device: means nothing to an ONNX file, and {tmp_path / file} is one. Take it away.\n"
    )
