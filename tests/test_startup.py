"""`--help` must not pay for torch; how long it takes is a row of the benchmark."""

import subprocess
import sys

import pytest

from lorasurgery import plugins

HEAVY = (
    "torch",
    "numba",
    "transformers",
    "peft",
    "bitsandbytes",
    "onnx",
    "onnxruntime",
    "gguf",
    "triton",
)
COMMANDS = [name.replace("_", "-") for name in plugins.names("cli") if name != "app"]


def imported(code: str) -> set[str]:
    """The heavy modules that this code loads in a fresh interpreter."""
    code = f"import sys\n{code}\nprint(*(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_heavy():
    assert imported("import lorasurgery.cli.app") == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_gives_an_example(command):
    done = subprocess.run(
        [sys.executable, "-m", "lorasurgery", command, "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Usage: " in done.stdout
    assert f"lorasurgery {command} " in done.stdout
