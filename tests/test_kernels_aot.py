"""Kernels compiled for GPUs that are not here: they fit, spill nothing, and use what the chips have.

benchmarks/results/kernels.json keeps what the compilers made of every configuration, by the hash of its sources.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton.language as tl

from benchmarks.aot import CHIPS
from benchmarks.widths import narrowest
from lorasurgery import plugins

ROOT = Path(__file__).parents[1]
# the instructions of the chips' matrix units; the larger ones want 64 rows of the first factor
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
FIRST = {"forward": "BN", "backward": "BM", "shrink_tiles": "BM", "expand_tiles": "BM"}
UNPACK = {"matvec", "forward", "backward", "dequantize"}
FIELDS = {
    "registers",
    "spills",
    "shared",
    "warps",
    "matrix",
    "packed",
    "wide",
    "stored",
    "occupancy",
}


def without_interpreter(*command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows():
    return without_interpreter("-m", "benchmarks.kernels", "--known")


def test_every_configuration_of_every_kernel_is_known(rows):
    unknown = rows.count(None)
    assert unknown == 0, f"{unknown} of {len(rows)} have changed: run `make kernels`"
    launched = {
        n for n in plugins.names("kernels") if hasattr(plugins.load("kernels", n), "launch")
    }
    for chip in CHIPS:
        assert {r["label"].split()[0] for r in rows if r["chip"] == chip.name} == launched
    assert all(set(r["code"]) == FIELDS for r in rows)


def constant(row, name):
    return dict(pair.split("=") for pair in row["constants"].split()).get(name)


def unit(row, function):
    """The instruction that a product is wanted by."""
    if function not in FIRST:
        return ""
    chip, single = row["chip"], row["dtype"] == "float32"
    if chip == "gfx942":
        return "mfma"
    if single:
        # there is none for float32 that would not cut it
        return ""
    return MATRIX[chip] if int(constant(row, FIRST[function])) >= 64 else "HMMA"


def test_they_fit_spill_nothing_and_use_what_the_chips_have(rows):
    for row in rows:
        code, function = row["code"], row["kernel"].rpartition(".")[2]
        where = f"{row['chip']} {row['label']} {row['kernel']} {row['constants']}: {code}"
        assert code["spills"] == 0, where
        # a thread of gfx942 has as many again for its matrix units
        assert 0 < code["registers"] <= (512 if row["chip"] == "gfx942" else 255), where
        assert code["shared"] <= row["shared_limit"], where
        assert 0 < code["occupancy"] <= 1, where
        assert code["matrix"] == unit(row, function), where


def test_codes_are_loaded_by_128_bits(rows):
    seen = set()
    for row in rows:
        code, function = row["code"], row["kernel"].rpartition(".")[2]
        if function not in UNPACK or row["kernel"].startswith("_double"):
            continue
        where = f"{row['chip']} {row['label']} {row['kernel']} {row['constants']}: {code}"
        if constant(row, "ODD") == "True":
            # found weight by weight
            assert code["packed"] == code["wide"] == 8, where
            continue
        if int(constant(row, "BLOCK")) < 32:
            # smaller than any file's, and in small programs
            continue
        # tiles of float32 are small: what bounds them is arithmetic outside of matrix units
        wide = 32 if row["dtype"] == "float32" and function in FIRST else 128
        assert code["packed"] >= wide, where
        seen.add((row["chip"], function))
    assert seen == {(chip.name, function) for chip in CHIPS for function in UNPACK}


SAMPLE = """
import json
from benchmarks.aot import CHIPS, compiled, key
from benchmarks.kernels import RESULTS, calls, read
from dataclasses import asdict
known = read(RESULTS)
for chip in CHIPS:
    first = {}
    for label, call in calls(chip):
        first.setdefault(call.name.partition(".")[2], call)
    for name in ("matvec", "expand_tiles", "dequantize"):
        call = first[name]
        print(json.dumps([asdict(compiled(call, chip)), asdict(known[key(call, chip)])]))
"""


def test_compiling_a_sample_again_gives_what_is_kept():
    pairs = without_interpreter("-c", SAMPLE)
    assert len(pairs) == 3 * len(CHIPS)
    for fresh, kept in pairs:
        assert fresh == kept


# of a layer in NF4, or on its way into it: whether codes are loaded (dense weights are, if not), and stored
LAYERS = {
    "nf4_dequantize": (True, False),
    "nf4_quantize": (False, True),
    "nf4_error": (True, False),
    "nf4_merge": (True, True),
    "nf4_decode_merge": (True, False),
    "nf4_encode_merge": (False, True),
}


def test_a_layer_s_codes_and_weights_move_by_128_bits_in_the_machine_code_too(rows):
    """A layout allows it, and a mask may forbid it. 16 weights a thread have codes of 64 bits: the last of three."""
    seen = Counter()
    for row in (r for r in rows if r["label"] in LAYERS):
        code, (loaded, stored) = row["code"], LAYERS[row["label"]]
        where = f"{row['chip']} {row['label']} {row['constants']}: {code}"
        weights = constant(row, "SIZE") or int(constant(row, "BLOCK")) * int(constant(row, "ROWS"))
        threads = code["warps"] * (64 if row["chip"] == "gfx942" else 32)
        bits = 4 * int(weights) // threads
        assert code["wide"] == (bits if loaded else 128), where
        assert code["stored"] == (bits if stored else 0), where
        seen[row["chip"], row["label"], bits] += 1
    expected = Counter()
    for chip in CHIPS:
        for label in LAYERS:
            narrow = label != "nf4_dequantize"
            expected[chip.name, label, 128] += 3 - narrow
            expected[chip.name, label, 64] += narrow
    assert seen == expected


def copied(source, codes):
    """Two lines that are looked for, and one that is not."""
    packed = tl.load(source)
    scale = tl.load(source + 1)
    tl.store(codes, (packed * scale).to(tl.uint8))


NVIDIA = """
	//## File "/somewhere/else/test_kernels_aot.py", line {0}
        /*0070*/                   @!P0 LDG.E.128 R4, [R2.64] ;
        /*0080*/                   LDG.E.64.CONSTANT R4, desc[UR16][R2.64] ;
	//## File "/somewhere/else/test_kernels_aot.py", line {1}
        /*0090*/                   LDG.E.U8 R4, [R2.64] ;
	//## File "/somewhere/else/test_kernels_aot.py", line {2}
        /*00a0*/                   STG.E [R2.64], R4 ;
        /*00b0*/                   STG.E.128 [R2.64], R4 ;
"""
AMD = """
	.loc	3 {0} 21                         ; test_kernels_aot.py:{0}:21 @[ other.py:29:33 ]
	buffer_load_dwordx2 v[6:9], v2, s[4:7], 0 offen
	global_load_dwordx4 v[6:9], v2, s[4:5]
	.loc	3 {1} 13                         ; test_kernels_aot.py:{1}:13
	buffer_load_ubyte v[6:9], v2, s[4:7], 0 offen
	.loc	3 {2} 5                          ; test_kernels_aot.py:{2}:5
	buffer_store_dwordx4 v[6:9], v2, s[4:7], 0 offen
	buffer_store_dword v2, v2, s[4:7], 0 offen
"""


@pytest.mark.parametrize("code", [NVIDIA, AMD], ids=["nvidia", "amd"])
def test_the_narrowest_load_and_store_of_codes_are_found_in_machine_code(code):
    first = copied.__code__.co_firstlineno
    text = code.format(first + 2, first + 3, first + 4)
    assert narrowest([SimpleNamespace(fn=copied)], text) == (64, 32)


ROUNDED = """
from benchmarks.aot import CHIPS, recorded
from benchmarks.kernels import layer
from functools import partial
from inspect import signature
from lorasurgery import plugins
import json, re
chip = next(chip for chip in CHIPS if chip.name == "sm_90")
for name, more in {names}.items():
    launch = plugins.load("kernels", name).launch
    given = signature(launch).bind(*layer(name)).arguments
    for extra in ({{}}, more):
        for one in recorded(partial(launch, **given | extra), chip, all_configs=False):
            text = one.kernel.run(*one.args, grid=one.grid, warmup=True, **one.options).asm["ptx"]
            found = sorted(set(re.findall(r"\\b(?:add|sub|mul|fma|div|rcp|sqrt|cvt)\\.[a-z0-9.]*f(?:16|32|64)\\b", text)))
            print(json.dumps([one.name, found, "ftz" in text, "approx" in text]))
"""
# the kernels that an operation's bytes depend on, and the arguments of a call by chance
CHANCE = {
    "nf4_quantize": {"seed": 3}, "nf4_dequantize": {}, "lora_merge": {"seed": 3},
    "dora_merge": {"seed": 3}, "nf4_merge": {"seed": 3}, "nf4_encode_merge": {"seed": 3},
}  # fmt: skip
WIDENING = {"cvt.f32.bf16", "cvt.f32.f16", "cvt.f64.f32"}


def test_what_makes_an_output_s_bytes_rounds_each_operation_by_itself_to_the_nearest():
    """No fused multiply-add, no flush of denormals to zero, no approximate division, as on the processor."""
    functions = without_interpreter("-c", ROUNDED.format(names=CHANCE))
    assert len(functions) == 2 * (len(CHANCE) + 1)
    for name, operations, flushed, approximate in functions:
        assert operations, name
        for operation in set(operations) - WIDENING:
            assert ".rn." in operation, (name, operation)
            assert not operation.startswith("fma"), (name, operation)
        assert (flushed, approximate) == (False, False), name
