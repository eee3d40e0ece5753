"""The command line's frame: what is printed where, exit codes, flags, config files, interruptions."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lorasurgery import __version__, plugins
from lorasurgery.checkpoint import JOURNAL
from lorasurgery.cli._options import Printing, Writing, with_flags
from lorasurgery.cli._report import as_table
from lorasurgery.cli._sizes import show_bytes, show_count, size
from lorasurgery.cli.app import app, command_names
from lorasurgery.surgery import Report, Result

# the one command that every test here runs: no kernel takes part in it
CONVERT = "convert-checkpoint"


def cli(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in this process."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="lorasurgery")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorasurgery", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})  # type: ignore[call-overload]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three layers in float32, whose rounding to bfloat16 is known, and a norm that is exact."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {
        f"model.layers.{i}.up.weight": np.full((4, 6), 1 + 2**-9, np.float32) for i in range(3)
    }
    tensors["model.norm.weight"] = np.ones(6, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    return folder


def test_help_lists_every_command_with_its_first_line() -> None:
    running = process("--help", env={**os.environ, "COLUMNS": "120"})
    lines = running.communicate()[0].splitlines()
    assert lines[0] == "Usage: lorasurgery [OPTIONS] COMMAND [ARGS]..."
    listed = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in listed] == command_names()
    assert not any(line.endswith("...") for line in listed)  # each first line fits


def test_a_file_with_underscores_is_a_command_with_hyphens() -> None:
    assert "convert_checkpoint" in plugins.names("cli")
    assert "convert-checkpoint" in command_names()
    assert cli("convert_checkpoint", "--help")[0] == 2


def test_version_is_printed() -> None:
    assert cli("--version") == (0, f"lorasurgery {__version__}\n", "")


def test_a_mistyped_command_is_a_usage_error_that_names_the_nearest() -> None:
    code, stdout, stderr = cli("quantise", "x")
    assert (code, stdout) == (2, "")
    assert stderr.endswith("Error: no command 'quantise'. Did you mean 'quantize'?\n")


def test_without_output_the_command_says_which_flag_is_missing(base: Path) -> None:
    assert cli(CONVERT, base) == (
        2, "", "error: --output: is missing. Pass -o DIR, or --dry-run for the report alone.\n",
    )  # fmt: skip


def test_resume_and_overwrite_exclude_each_other(base: Path, tmp_path: Path) -> None:
    assert cli(CONVERT, base, "-o", tmp_path / "out", "--resume", "--overwrite") == (
        2, "",
        "error: --resume: goes on with what --overwrite discards. Pass one of the two.\n",
    )  # fmt: skip


def test_what_the_user_can_put_right_is_one_line_and_exit_1(tmp_path: Path) -> None:
    code, stdout, stderr = cli(CONVERT, tmp_path / "nothing", "-o", tmp_path / "out")
    assert (code, stdout) == (1, "")
    assert stderr == f"error: {tmp_path}/nothing: no such file or directory. Check the path.\n"
    assert not list(tmp_path.iterdir())


def test_a_failed_command_prints_no_json(tmp_path: Path) -> None:
    code, stdout, _ = cli(CONVERT, tmp_path / "nothing", "-o", tmp_path / "out", "--json")
    assert (code, stdout) == (1, "")


def test_the_report_is_a_table_folded_by_layer(base: Path, tmp_path: Path) -> None:
    code, stdout, stderr = cli(CONVERT, base, "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert (code, stderr) == (0, "")
    *lines, last = stdout.splitlines()
    # 1 + 2^-9 becomes 1: the error is 2^-9 / (1 + 2^-9) = 0.195 %
    assert lines == [
        "tensor                             relative error",
        "model.layers.{0..2}.up.weight  x3         0.195 %",
        "model.norm.weight                             0 %",
        "",
        "tensors         4",
        "relative error  0.187 %",
    ]
    assert last.startswith(f"wrote {tmp_path}/out in ")


def test_v_prints_each_tensor(base: Path, tmp_path: Path) -> None:
    _, stdout, _ = cli(CONVERT, base, "-o", tmp_path / "out", "--dtype", "bfloat16", "-v")
    assert stdout.splitlines()[1:5] == [
        "model.layers.0.up.weight           0.195 %",
        "model.layers.1.up.weight           0.195 %",
        "model.layers.2.up.weight           0.195 %",
        "model.norm.weight                      0 %",
    ]


def test_q_prints_nothing(base: Path, tmp_path: Path) -> None:
    assert cli(CONVERT, base, "-o", tmp_path / "out", "-q") == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_json_is_pure_and_the_report_file_holds_the_same(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code, stdout, stderr = cli(
        CONVERT, base, "-o", tmp_path / "out", "--dtype", "bfloat16", "--json", "--report", file
    )
    assert (code, stderr) == (0, "")
    assert file.read_text() == stdout
    found = json.loads(stdout)
    assert found["operation"] == CONVERT
    assert found["output"] == str(tmp_path / "out")
    assert found["tensors"]["model.layers.1.up.weight"]["relative_error"] == pytest.approx(
        2**-9 / (1 + 2**-9), rel=1e-6
    )
    assert found["tensors"]["model.norm.weight"]["relative_error"] == 0
    assert found["total"]["tensors"] == 4


def test_a_report_that_could_not_be_written_stops_the_command_before_it_begins(
    base: Path, tmp_path: Path
) -> None:
    code, _, stderr = cli(CONVERT, base, "-o", tmp_path / "out", "--report", tmp_path / "no" / "r")
    assert (code, stderr) == (
        2, f"error: --report: there is no directory {tmp_path}/no. Make it first.\n",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reports_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    code, stdout, _ = cli(CONVERT, base, "--dry-run", "--dtype", "bfloat16")
    assert code == 0
    assert stdout.splitlines()[-1].startswith("dry run in ")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_output_that_exists_is_replaced_only_when_asked(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli(CONVERT, base, "-o", out)[0] == 0
    assert cli(CONVERT, base, "-o", out) == (
        1, "", f"error: {out}: exists and is not empty. Pass --overwrite, or name another.\n",
    )  # fmt: skip
    assert cli(CONVERT, base, "-o", out, "--overwrite", "--dtype", "float16")[0] == 0
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == np.float16


def test_shards_are_no_larger_than_asked(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli(CONVERT, base, "-o", out, "--max-shard-size", "0.2KB")[0] == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == 3 * 96 + 24


# ---- config files


def configured(tmp_path: Path, text: str, *arguments: object) -> tuple[int, str, str]:
    (tmp_path / "c.yaml").write_text(text)
    return cli(CONVERT, *arguments, "-c", tmp_path / "c.yaml")


def test_a_config_file_gives_any_option_and_argument(base: Path, tmp_path: Path) -> None:
    text = (
        f"base: {base}\noutput: {tmp_path}/out\ndtype: float16\nmax-shard-size: 1GB\njson: true\n"
    )
    code, stdout, stderr = configured(tmp_path, text)
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["output"] == f"{tmp_path}/out"
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == np.float16
    )


def test_a_flag_wins_over_the_config_file(base: Path, tmp_path: Path) -> None:
    text = f"output: {tmp_path}/a\ndtype: float16\nmax_memory: 1GiB\n"
    code, _, stderr = configured(tmp_path, text, base, "-o", tmp_path / "b", "--dtype", "float32")
    assert (code, stderr) == (0, "")
    assert not (tmp_path / "a").exists()
    assert load_file(tmp_path / "b" / "model.safetensors")["model.norm.weight"].dtype == np.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtpe: float16", "no option 'dtpe'. Did you mean 'dtype'?"),
        ("max-shardsize: 1GB", "no option 'max-shardsize'. Did you mean 'max-shard-size'?"),
        ("config: other.yaml", "no option 'config'. "),
        ("dtype: [float16]", "dtype is ['float16']; one value is wanted."),
        ("dtype:", "dtype is None; one value is wanted."),
        ("- dtype", "holds a list, not options by name."),
        ("a: b: c", "is no YAML (mapping values are not allowed here"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_a_usage_error(
    base: Path, tmp_path: Path, text: str, message: str
) -> None:
    code, stdout, stderr = configured(tmp_path, text, base, "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert f"Error: Invalid value for '--config' / '-c': {tmp_path}/c.yaml: {message}" in stderr


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("jobs: many", "--jobs"),
        ("overwrite: perhaps", "--overwrite"),
        ("max-memory: 5", "--max-memory"),
    ],
)
def test_a_config_files_values_are_checked_like_typed_ones(
    base: Path, tmp_path: Path, text: str, flag: str
) -> None:
    code, _, stderr = configured(tmp_path, text, base, "-o", tmp_path / "out")
    assert code == 2
    assert f"Error: Invalid value for '{flag}'" in stderr


def test_repeatable_options_are_lists_in_a_config_file(tmp_path: Path) -> None:
    seen = []

    def command(names: list[str] | None = None, *, printing: Printing) -> None:
        seen.append((names, printing.verbose, printing.report))

    single = typer.Typer()
    single.command()(with_flags(command))
    (tmp_path / "c.yaml").write_text("names: [a, b]\nverbose: true\nreport: x.json")
    CliRunner().invoke(single, ["-c", str(tmp_path / "c.yaml")], catch_exceptions=False)
    (tmp_path / "c.yaml").write_text("names: a")
    CliRunner().invoke(single, ["-c", str(tmp_path / "c.yaml")], catch_exceptions=False)
    assert seen == [(["a", "b"], True, Path("x.json")), (["a"], False, None)]


def test_a_group_of_flags_arrives_as_one_dataclass() -> None:
    seen = []

    def command(*, writing: Writing) -> None:
        seen.append(writing)

    single = typer.Typer()
    single.command()(with_flags(command))
    typed = ["-o", "out", "--durable", "-j", "3", "--max-memory", "512MB"]
    CliRunner().invoke(single, typed, catch_exceptions=False)
    expected = Writing(output=Path("out"), durable=True, jobs=3, max_memory=512_000_000)
    assert seen == [expected]
    assert expected.max_shard_size == 5_000_000_000


# ---- sizes and numbers


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MB", 512_000_000), ("2GiB", 2 << 30), ("5GB", 5_000_000_000), ("1.5 gib", 3 << 29),
        ("64kB", 64_000), ("100B", 100), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_a_size_is_read_in_its_unit(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["512", "5G", "GB", "-1GB", "1e9B", ""])
def test_a_size_without_a_clear_unit_is_refused(text: str) -> None:
    with pytest.raises(
        typer.BadParameter, match=rf"^'{text}' is no size\. Write it as 512MB or 2GiB\.$"
    ):
        size(text)


def test_numbers_are_shown_short() -> None:
    assert [show_bytes(n) for n in (0, 1023, 1024, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "5.00 GiB",
    ]
    assert [show_count(n) for n in (999, 134_515_008, 7e10)] == ["999", "134.5 M", "70 B"]


# ---- the report's columns


def test_a_fold_shows_the_mean_and_what_is_worst() -> None:
    retained = (0.99, 0.4, 1.3)
    results = tuple(
        Result(f"l.{i}.w", {"retained": r, "noise": 0.5, "error2": 7.0}, {}, {})
        for i, r in enumerate(retained)
    )
    report = Report("merge", results, 1.25, {"noise": 0.5, "some_count": 3, "retained": 0.8969})
    assert as_table(report, Path("out"), Printing()).splitlines() == [
        "tensor                     retained  noise",
        "l.{0..2}.w  x3  0.897 (worst 0.400)  0.500",
        "",
        "retained    0.897",
        "noise       0.500",
        "some count  3",
        "wrote out in 1.2 s",
    ]


def test_numbers_that_json_lacks_are_null() -> None:
    from lorasurgery.cli._print import to_json

    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5]})) == {
        "a": None, "b": [None, 1.5],
    }  # fmt: skip


# ---- terminals and pipes


def on_a_terminal(*arguments: object, **env: str) -> str:
    """What appears on a terminal that is the command's stderr."""
    ours, theirs = pty.openpty()
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    running = process(*arguments, stderr=theirs, env={**keep, "TERM": "xterm", **env})
    running.communicate()
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    except OSError:  # the other end is closed and all is read
        pass
    os.close(ours)
    return seen.decode()


def test_a_progress_bar_is_drawn_on_a_terminal_alone(base: Path, tmp_path: Path) -> None:
    drawn = on_a_terminal(CONVERT, base, "-o", tmp_path / "a")
    assert "━" in drawn
    assert "\x1b[38" in drawn or "\x1b[3" in drawn  # in colour
    assert on_a_terminal(CONVERT, base, "-o", tmp_path / "b", "-q") == ""
    piped = process(CONVERT, base, "-o", tmp_path / "c")
    assert piped.communicate()[1] == ""


def test_no_color_is_honoured(base: Path, tmp_path: Path) -> None:
    drawn = on_a_terminal(CONVERT, base, "-o", tmp_path / "out", NO_COLOR="1")
    assert "━" in drawn
    assert "\x1b[3" not in drawn


def test_a_reader_that_has_had_enough_is_no_error(base: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    running = process("inspect", base, stdout=write)
    os.close(write)
    assert running.communicate()[1] == ""
    assert running.returncode == 1


def test_a_full_disk_under_stdout_is_one_line(base: Path) -> None:
    with Path("/dev/full").open("w") as full:
        running = process("inspect", base, stdout=full)
    assert running.communicate()[1] == (
        "error: stdout: No space left on device. Make room, or name another output.\n"
    )
    assert running.returncode == 1


# ---- what the system refuses


def test_a_file_that_the_system_will_not_let_grow_is_named_in_one_line(
    base: Path, tmp_path: Path
) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    running = process(CONVERT, base, "-o", tmp_path / "out", preexec_fn=small_files)
    _, stderr = running.communicate()
    assert running.returncode == 1
    assert stderr == (
        f"error: {tmp_path}/out.partial/model.safetensors: the file cannot be written (File too "
        "large). Check the disk, or name another output.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---- Ctrl-C


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A gigabyte of zeros that takes no room: long enough to be interrupted in."""
    header, at = {}, 0
    for i in range(64):
        header[f"w.{i}"] = {
            "dtype": "F32",
            "shape": [4096, 1024],
            "data_offsets": [at, at + (16 << 20)],
        }
        at += 16 << 20
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    return path


def interrupted(tmp_path: Path, *arguments: object) -> tuple[int, str, str]:
    """Ctrl-C as soon as the journal has an edit; one thread and small tiles make it slow."""
    slow = ("-o", tmp_path / "out", "--dtype", "bfloat16", "-j", "1", "--max-memory", "1MB")
    running = process(CONVERT, *arguments, *slow)
    journal = tmp_path / "out.partial" / JOURNAL
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert running.poll() is None, running.communicate()
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate()
    return running.returncode, stdout, stderr


def test_ctrl_c_leaves_nothing_and_says_so_in_a_line(large: Path, tmp_path: Path) -> None:
    assert interrupted(tmp_path, large) == (
        130, "",
        f"error: {tmp_path}/out: interrupted, and nothing is left behind. Repeat the command.\n",
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]


def test_ctrl_c_with_resume_leaves_what_the_next_run_goes_on_with(
    large: Path, tmp_path: Path
) -> None:
    assert interrupted(tmp_path, large, "--resume") == (
        130, "",
        f"error: {tmp_path}/out.partial: interrupted. Repeat the command with --resume to go on.\n",
    )  # fmt: skip
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["large.safetensors", "out.partial"]
    done = process(CONVERT, large, "-o", tmp_path / "out", "--dtype", "bfloat16", "--resume")
    assert done.communicate()[1] == ""
    assert done.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.safetensors", "out"]
