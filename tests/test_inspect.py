"""inspect: facts from headers alone, on this machine and on a hub, whatever the format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file


class Hub:
    """A hub on 127.0.0.1 that serves one directory as org/name, and remembers what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, 0
        self.asked: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append((path, self.headers.get("Range")))
                status, body, more = hub.answer(path, self.headers.get("Range"))
                hub.sent += len(body)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **more}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
        kind = {"Content-Type": "application/json"}
        if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            return 200, json.dumps({"id": "org/name", "sha": "0" * 40}).encode(), kind
        if path.startswith("/api/models/org/name/tree/"):
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "1" * 40}
                for f in sorted(self.folder.iterdir())
            ]
            return 200, json.dumps(files).encode(), kind
        file = self.folder / path.rpartition("/")[2]
        if "/org/name/resolve/" not in path or not file.exists():
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        size = file.stat().st_size
        start, stop = 0, size
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1
        with file.open("rb") as data:
            data.seek(start)
            body = data.read(stop - start)
        return 206, body, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "hub"
    folder.mkdir()
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()


def remote(hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    gone = ("HF_HUB_OFFLINE", "HF_TOKEN")
    env = {k: v for k, v in os.environ.items() if k not in gone}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder.parent / "home")}
    return subprocess.run(
        [sys.executable, "-m", "lorasurgery", "inspect", *arguments],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorasurgery", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def facts(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def tensors(layers: int) -> dict[str, np.ndarray]:
    made = {"model.embed_tokens.weight": np.zeros((50, 24), np.float16)}
    for i in range(layers):
        made[f"model.layers.{i}.mlp.up_proj.weight"] = np.zeros((40, 24), np.float16)
        made[f"model.layers.{i}.norm.weight"] = np.zeros(24, np.float32)
    return made


def nf4(name: str, out: int, in_: int, *, double: bool) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes stores for one weight, in blocks of 64."""
    n, blocks = out * in_, -(-out * in_ // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, in_]}
    made = {"": np.zeros((n // 2, 1), np.uint8), ".quant_map": np.zeros(16, np.float32)}
    made[".absmax"] = np.zeros(blocks, np.uint8 if double else np.float32)
    if double:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        made[".nested_absmax"] = np.zeros(-(-blocks // 256), np.float32)
        made[".nested_quant_map"] = np.zeros(256, np.float32)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    made[".quant_state.bitsandbytes__nf4"] = text
    return {name + part: data for part, data in made.items()}


def test_a_checkpoint_is_told_in_a_few_lines(tmp_path: Path) -> None:
    save_file(tensors(3), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"""\
{tmp_path}

format        safetensors
architecture  LlamaForCausalLM
parameters    4.152 K
size          8.25 KiB

dtype  tensors  elements      size
F16          4    4.08 K  7.97 KiB
F32          3        72     288 B

model.embed_tokens.weight               F16 [50, 24]
model.layers.{{0..2}}.mlp.up_proj.weight  F16 [40, 24]  x3
model.layers.{{0..2}}.norm.weight         F32 [24]      x3
"""
    )


def test_v_names_each_tensor(tmp_path: Path) -> None:
    save_file(tensors(2), tmp_path / "model.safetensors")
    lines = run(tmp_path, "-v").stdout.splitlines()
    assert "model.layers.1.mlp.up_proj.weight  F16 [40, 24]" in lines


def test_layers_that_differ_are_not_folded_together(tmp_path: Path) -> None:
    made = tensors(6)
    made["model.layers.3.mlp.up_proj.weight"] = np.zeros((41, 24), np.float16)
    save_file(made, tmp_path / "model.safetensors")
    rows = {(r["name"], tuple(r["shape"])): r["count"] for r in facts(tmp_path)["modules"]}
    assert rows[("model.layers.{0..2,4..5}.mlp.up_proj.weight", (40, 24))] == 5
    assert rows[("model.layers.3.mlp.up_proj.weight", (41, 24))] == 1


def test_experts_are_folded_over_layers_and_experts(tmp_path: Path) -> None:
    made = {
        f"l.{i}.experts.{j}.w1.weight": np.zeros((4, 6), np.float32)
        for i in (0, 1)
        for j in (0, 1, 2)
    }
    save_file(made, tmp_path / "model.safetensors")
    (row,) = facts(tmp_path)["modules"]
    assert (row["name"], row["count"]) == ("l.{0..1}.experts.{0..2}.w1.weight", 6)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_weights_are_shown_as_what_they_stand_for(tmp_path: Path, double: bool) -> None:
    made = nf4("a.0.weight", 96, 64, double=double) | nf4("a.1.weight", 96, 64, double=double)
    made["norm.weight"] = np.zeros(64, np.float32)
    save_file(made, tmp_path / "model.safetensors")
    found = facts(tmp_path)
    assert found["parameters"] == 2 * 96 * 64 + 64
    assert [(r["name"], r["dtype"], r["shape"], r["count"]) for r in found["modules"]] == [
        ("a.{0..1}.weight", "NF4", [96, 64], 2),
        ("norm.weight", "F32", [64], 1),
    ]
    stored = sum(data.nbytes for name, data in made.items() if name.startswith("a.0."))
    assert found["quantization"] == {
        "method": "nf4",
        "block_sizes": [64],
        "double": [double],
        "weights": 2,
        "bits_per_quantized_parameter": 8 * stored / (96 * 64),
        "bits_per_parameter": 8 * (2 * stored + 256) / (2 * 96 * 64 + 64),
    }
    assert found["nbytes"] == 2 * stored + 256
    line = "nf4, blocks of 64" + (", scales quantized as well" if double else "")
    assert f"quantization  {line}: 2 weights, " in run(tmp_path).stdout


def test_another_quantization_is_named_as_the_config_names_it(tmp_path: Path) -> None:
    save_file({"a.qweight": np.zeros((4, 6), np.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "gptq", "bits": 4}}'
    )
    found = facts(tmp_path)
    assert found["quantization"] == {
        "method": "gptq",
        "config": {"quant_method": "gptq", "bits": 4},
    }
    assert found["parameters"] == 0  # what is packed into integers, only GPTQ knows


def test_a_gguf_file_has_its_types_as_stored(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", 2)
    rows = gguf.quantize(np.ones((8, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    for i in range(2):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    found = facts(tmp_path / "m.gguf")
    assert (found["format"], found["architecture"]) == ("gguf", "llama")
    assert found["parameters"] == 2 * 8 * 64 + 64
    assert [(r["name"], r["dtype"], r["shape"]) for r in found["modules"]] == [
        ("model.layers.{0..1}.mlp.up_proj.weight", "Q8_0", [8, 64]),
        ("model.norm.weight", "F32", [64]),
    ]
    assert found["quantization"]["bits_per_quantized_parameter"] == 8.5  # 34 bytes for 32 weights


def test_a_bin_file_is_read_by_torch(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(3, 5, dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    found = facts(tmp_path)
    assert (found["format"], found["parameters"]) == ("torch_bin", 15)
    assert found["modules"][0]["dtype"] == "BF16"


def test_our_own_output_says_what_made_it(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "model.safetensors")
    made = subprocess.run(
        [sys.executable, "-m", "lorasurgery", "convert-checkpoint", tmp_path / "model.safetensors",
         "-o", tmp_path / "out", "--dtype", "bfloat16"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "wrote" in made.stdout
    found = facts(tmp_path / "out")
    assert found["surgery"]["operation"] == "convert-checkpoint"
    assert found["surgery"]["settings"] == {"dtype": "BF16"}
    assert (
        f"made by     lorasurgery convert-checkpoint {tmp_path}/model.safetensors\n"
        in run(tmp_path / "out").stdout
    )


def site(prefix: str, a: str, b: str, rank: int) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{a}": np.zeros((rank, 24), np.float32),
        f"{prefix}{b}": np.zeros((40, rank), np.float32),
    }


def test_a_peft_adapter_is_told_by_its_config_and_its_tensors(tmp_path: Path) -> None:
    path = "base_model.model.model.layers.{}.self_attn.{}_proj"
    made: dict[str, np.ndarray] = {}
    for i, name, rank in ((0, "q", 8), (0, "v", 4), (1, "q", 8)):
        made |= site(path.format(i, name), ".lora_A.weight", ".lora_B.weight", rank)
        made[path.format(i, name) + ".lora_magnitude_vector"] = np.zeros(40, np.float32)
    save_file(made, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "use_dora": True, "use_rslora": True, "r": 8, "lora_alpha": 32,
        "alpha_pattern": {"v_proj": 5}, "rank_pattern": {"v_proj": 4}, "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "org/base",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        adapter = facts(path)["adapter"]
        assert adapter.pop("config") == config
        assert adapter == {
            "layout": "peft", "variant": "dora", "rank_stabilized": True,
            "ranks": {"4": 1, "8": 2}, "alphas": [5.0, 32.0], "modules": 3,
            "targets": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "base": "org/base",
        }  # fmt: skip
    text = run(tmp_path).stdout
    assert "adapter     dora, rank-stabilized, peft layout\n" in text
    assert "rank        4, 8\n" in text
    assert "alpha       5, 32\n" in text
    assert "modules     3: q_proj, v_proj\n" in text


def test_a_kohya_file_is_told_by_its_keys(tmp_path: Path) -> None:
    made: dict[str, np.ndarray] = {}
    for i in (0, 1):
        path = f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q"
        made |= site(path, ".lora_down.weight", ".lora_up.weight", 16)
        made[f"{path}.alpha"] = np.array(8, np.float16)
    save_file(made, tmp_path / "style.safetensors", {"ss_sd_model_name": "sdxl.safetensors"})
    assert facts(tmp_path / "style.safetensors")["adapter"] == {
        "layout": "kohya", "variant": "lora", "rank_stabilized": False, "ranks": {"16": 2},
        "alphas": [8.0], "modules": 2, "targets": ["attn1_to_q"], "modules_to_save": [],
        "base": "sdxl.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "variant", "ranks"),
    [
        ({".hada_w1_a": (40, 4), ".hada_w1_b": (4, 24), ".hada_w2_a": (40, 4), ".hada_w2_b": (4, 24)}, "loha", {"4": 1}),
        ({".lokr_w1": (5, 4), ".lokr_w2_a": (8, 3), ".lokr_w2_b": (3, 6)}, "lokr", {"3": 1}),
        ({".lora_A": (6, 24), ".lora_B": (40, 6), ".lora_E": (6, 1)}, "adalora", {"6": 1}),
        ({".vera_lambda_b": (40,), ".vera_lambda_d": (7,)}, "vera", {"7": 1}),
        ({".oft_R.weight": (6, 6)}, "oft", {}),
        ({".lora_down.weight": (4, 24), ".lora_up.weight": (40, 4), ".dora_scale": (40, 1)}, "dora", {"4": 1}),
    ],
)  # fmt: skip
def test_a_variant_is_told_by_its_factors(
    tmp_path: Path, parts: dict[str, tuple[int, ...]], variant: str, ranks: dict[str, int]
) -> None:
    made = {
        f"base_model.model.a.q_proj{p}": np.zeros(shape, np.float32) for p, shape in parts.items()
    }
    save_file(made, tmp_path / "some.safetensors")
    adapter = facts(tmp_path / "some.safetensors")["adapter"]
    assert (adapter["variant"], adapter["ranks"]) == (variant, ranks)
    assert (adapter["targets"], adapter["base"]) == (["q_proj"], None)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "model.safetensors")
    assert facts(tmp_path)["adapter"] is None


@pytest.fixture(scope="module")
def hundred_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 70-billion-parameter Llama in 21 shards, whose data are holes in the files."""
    folder = tmp_path_factory.mktemp("sparse")
    shapes = {"model.embed_tokens.weight": (128256, 8192), "lm_head.weight": (128256, 8192)}
    for i in range(50):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (8192, 8192) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (28672, 8192) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (8192, 28672)}
    names, weight_map = list(shapes), {}
    for number in range(21):
        file, at, header = f"model-{number + 1:05}-of-00021.safetensors", 0, {}
        for name in names[number::21]:
            end = at + 2 * shapes[name][0] * shapes[name][1]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, end]}
            weight_map[name], at = file, end
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_hundred_gigabytes_are_told_from_a_few_megabytes_of_headers(
    hundred_gigabytes: Path,
) -> None:
    found = facts(hundred_gigabytes)
    assert found["nbytes"] == 2 * found["parameters"] == 101_510_545_408
    assert (found["files"], len(found["modules"])) == (21, 9)
    code = (
        "import sys; from lorasurgery.cli.app import app\n"
        "try: app(['inspect', sys.argv[1], '-q'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(next(line for line in open('/proc/self/io') if line.startswith('rchar')).split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, hundred_gigabytes], capture_output=True, text=True, check=True
    )
    # the program itself is most of it
    assert int(done.stdout.split()[-1]) < 32 << 20


def test_neither_torch_nor_numpy_is_loaded(hundred_gigabytes: Path) -> None:
    code = (
        "import sys; from lorasurgery.cli.app import app\n"
        "try: app(['inspect', sys.argv[1], '-q'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*{'torch', 'numba', 'numpy', 'gguf', 'huggingface_hub', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, hundred_gigabytes], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda _: None, "error: {}/x: no such file or directory. Check the path.\n"),
        (lambda p: p.mkdir(), "error: {}/x: no weights (.safetensors, .gguf, .bin) in it. Check the path.\n"),
        (lambda p: p.write_text("x"), "error: {}/x: no format reads this files. Known: gguf, onnx, safetensors, torch_bin.\n"),
    ],
)  # fmt: skip
def test_what_cannot_be_inspected_is_one_line(
    tmp_path: Path, arrange: Callable[[Path], object], message: str
) -> None:
    arrange(tmp_path / "x")
    done = run(tmp_path / "x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message.format(tmp_path))


def test_a_hub_id_is_inspected_through_range_reads_alone(hub: Hub) -> None:
    weight_map = {f"a.{i}.weight": f"model-0000{i // 2 + 1}-of-00002.safetensors" for i in range(4)}
    for file in set(weight_map.values()):
        names = [name for name in weight_map if weight_map[name] == file]
        save_file(dict.fromkeys(names, np.ones((512, 512), np.float32)), hub.folder / file)
    index = {"weight_map": weight_map}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub.folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    done = remote(hub, "org/name@main")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == """\
org/name@main

format        safetensors, 2 files
architecture  LlamaForCausalLM
parameters    1.049 M
size          4.00 MiB

dtype  tensors  elements      size
F32          4   1.049 M  4.00 MiB

a.{0..3}.weight  F32 [512, 512]  x4
"""
    )
    fetched = [asked for asked in hub.asked if "/resolve/" in asked[0]]
    assert len(fetched) == 2 + 2 * 2  # index, config, and for each shard the length and the header
    assert all(wanted for _, wanted in fetched)
    assert hub.sent < 10_000
    assert not list(hub.folder.parent.glob("home/hub/**/*.safetensors"))


def test_an_adapter_on_the_hub_is_told_by_its_config(hub: Hub) -> None:
    save_file(
        site("base_model.model.q", ".lora_A.weight", ".lora_B.weight", 8),
        hub.folder / "adapter_model.safetensors",
    )
    (hub.folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 3}'
    )
    done = remote(hub, "org/name", "--json")
    assert json.loads(done.stdout)["adapter"]["alphas"] == [3.0]


def test_quantization_states_on_the_hub_are_fetched_and_nothing_else(hub: Hub) -> None:
    made = nf4("a.0.weight", 96, 64, double=True) | nf4("a.1.weight", 96, 64, double=True)
    save_file(made, hub.folder / "model.safetensors")
    found = json.loads(remote(hub, "org/name", "--json").stdout)
    assert (found["modules"][0]["dtype"], found["modules"][0]["shape"]) == ("NF4", [96, 64])
    fetched = [asked for asked in hub.asked if "/resolve/" in asked[0]]
    assert len(fetched) == 2 + 2


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "org/other", {},
            "error: org/other: no such path, and the hub does not give it (org/other (repository "
            "not found). If the repo is private, make sure you are authenticated and your token "
            "has the required permissions.). Check the name.\n",
        ),
        (
            "org/name", {"pytorch_model.bin": b"PK"},
            "error: org/name: no safetensors among its 1 files. Download it first: "
            "`hf download org/name`.\n",
        ),
        (
            "org/name", {"model.safetensors": b"\xff" * 16},
            "error: org/name/model.safetensors: the header claims 18446744073709551615 bytes of a "
            "file of 16. Tell its author.\n",
        ),
        (
            "org/name", {"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
            "error: org/name: model.safetensors.index.json: names ../b, which is not there. "
            "Tell its author.\n",
        ),
        (
            "org/name", {"a.safetensors": b"", "b.safetensors": b""},
            "error: org/name: 2 safetensors files and no index says how they belong together. "
            "Download the one that is meant.\n",
        ),
    ],
)  # fmt: skip
def test_what_the_hub_cannot_give_is_one_line(
    hub: Hub, name: str, files: dict[str, bytes], message: str
) -> None:
    for file, content in files.items():
        (hub.folder / file).write_bytes(content)
    done = remote(hub, name)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "lorasurgery", "inspect", "org/name"],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: org/name: no such path, and the hub does not give it (")
    assert done.stderr.count("\n") == 1
