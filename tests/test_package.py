"""The wheel holds the package alone, and works away from the source tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lorasurgery

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lorasurgery", source / "lorasurgery", ignore=ignore)
    for name in ("kernels", "formats", "cli"):
        (source / name).symlink_to(f"lorasurgery/{name}")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """Where the wheel is installed, without its dependencies: those are here already."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel],
        check=True,
    )  # fmt: skip
    return target


def test_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "lorasurgery").rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    assert packed == sources


def test_installed_command_runs_from_another_directory(site, tmp_path):
    done = subprocess.run(
        [site / "bin" / "lorasurgery", "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Usage: lorasurgery" in done.stdout


def test_installed_package_is_the_one_that_runs(site, tmp_path):
    code = "import lorasurgery; print(lorasurgery.__file__, lorasurgery.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(site / "lorasurgery/__init__.py"), lorasurgery.__version__]
