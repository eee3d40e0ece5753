"""The tuner: the first configuration unmeasured, else the fastest, measured once and kept on disk."""

import importlib
import json
import pkgutil
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from lorasurgery import kernels
from lorasurgery.kernels import _tuning, lora_adamw
from lorasurgery.kernels._tuning import Config, every, first, of_32_threads, tuned
from lorasurgery.kernels.lora_adamw import Rates

CONFIGS = Config(SIZE=1), Config(SIZE=2), Config(SIZE=3)
TIMES = {1: 3.0, 2: 1.0, 3: 2.0}


class Gpu:
    """Stands for one: counts what is measured, by a clock that is set."""

    def __init__(self, monkeypatch, tmp_path):
        self.measured, self.launched, self.capturing = [], [], False
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A chip")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(_tuning, "on_the_gpu", self.clock)
        self.restart()

    def clock(self, call):
        before = len(self.launched)
        call()
        [config] = self.launched[before:]
        self.measured.append(config["SIZE"])
        del self.launched[before:]
        return TIMES[config["SIZE"]]

    def restart(self):
        _tuning._known.cache_clear()

    def run(self, data=(), configs=CONFIGS):
        self.launched.clear()
        self.measured.clear()
        tuned("kernel", configs, data, self.launched.append)
        return [c["SIZE"] for c in self.launched], list(self.measured)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    yield Gpu(monkeypatch, tmp_path)
    _tuning._known.cache_clear()


def test_without_a_gpu_the_first_is_taken():
    launched = []
    tuned("kernel", CONFIGS, (), launched.append)
    assert launched == [CONFIGS[0]]


def test_the_fastest_is_measured_once_and_then_taken(gpu):
    assert gpu.run() == ([2], [1, 2, 3])
    assert gpu.run() == ([2], [])


def test_another_process_reads_what_was_measured(gpu, tmp_path):
    gpu.run()
    gpu.restart()
    assert gpu.run() == ([2], [])
    [file] = (tmp_path / "lorasurgery" / "tuning").iterdir()
    kept = json.loads(file.read_text())
    assert kept["config"] == {"SIZE": 2}
    assert json.loads(kept["key"]) == [
        "kernel", f"A chip triton {triton.__version__}", [dict(c) for c in CONFIGS], [],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", '{"key": "other", "config": {"SIZE": 1}}', "{}"])
def test_a_file_that_says_something_else_is_measured_again(gpu, tmp_path, text):
    gpu.run()
    gpu.restart()
    [file] = (tmp_path / "lorasurgery" / "tuning").iterdir()
    file.write_text(text)
    assert gpu.run() == ([2], [1, 2, 3])
    assert json.loads(file.read_text())["config"] == {"SIZE": 2}


def test_a_list_of_configurations_that_has_changed_is_measured_again(gpu):
    gpu.run()
    gpu.restart()
    assert gpu.run(configs=CONFIGS[::2]) == ([3], [1, 3])


def test_sizes_share_a_choice_up_to_the_next_power_of_two(gpu):
    for shape, measured in (((65, 3), True), ((128, 4), False), ((129, 4), True), ((128, 5), True)):
        assert bool(gpu.run((torch.empty(shape),))[1]) == measured
    assert gpu.run((torch.empty(65, 3, dtype=torch.float16),))[1]


@pytest.mark.parametrize("blocked", ["file", "home"])
def test_where_nothing_can_be_written_it_is_measured_by_each_process(gpu, tmp_path, blocked):
    if blocked == "file":
        (tmp_path / "lorasurgery").write_text("in the way of a directory")
    else:
        (tmp_path / "lorasurgery" / "tuning").mkdir(parents=True)
        # a directory of the name that the choice would get
        key = json.dumps(
            ["kernel", f"A chip triton {triton.__version__}", [dict(c) for c in CONFIGS], []]
        )
        name = _tuning.hashlib.sha256(key.encode()).hexdigest()[:32]
        (tmp_path / "lorasurgery" / "tuning" / f"{name}.json").mkdir()
    for _ in range(2):
        assert gpu.run() == ([2], [1, 2, 3])
        assert gpu.run() == ([2], [])
        gpu.restart()


def test_while_a_graph_is_captured_nothing_is_measured(gpu):
    gpu.capturing = True
    assert gpu.run() == ([1], [])
    # and nothing is remembered
    gpu.capturing = False
    assert gpu.run() == ([2], [1, 2, 3])


def test_what_the_chip_has_no_room_for_is_passed_over():
    def launch(config):
        if config["SIZE"] == 2:
            raise OutOfResources(300000, 232448, "shared memory")

    clock = iter([3.0, 2.0]).__next__
    found = _tuning.fastest(CONFIGS, launch, lambda call: (call(), clock())[1])
    assert found == CONFIGS[2]


def test_all_are_launched_where_all_are_asked_for():
    launched = []
    with every():
        tuned("kernel", CONFIGS, (), launched.append)
    assert launched == list(CONFIGS)
    tuned("kernel", CONFIGS, (), launched.append)
    assert len(launched) == 4


def test_the_first_is_taken_unmeasured_where_that_is_asked_for(gpu):
    with first():
        assert gpu.run() == ([1], [])
    assert gpu.run() == ([2], [1, 2, 3])


def test_a_step_in_place_is_tried_elsewhere(monkeypatch):
    """The clock runs each configuration, and the weights move by one step all the same."""
    w, grad, m, v = torch.rand(4, 900)
    want = lora_adamw.run(w, grad, m, v, 400, 3, Rates(1e-2))
    tried = []

    def tuned(_, configs, __, launch, trial):
        tried.extend(map(trial, configs))
        launch(configs[1])

    monkeypatch.setattr(_tuning, "tuned", tuned)
    lora_adamw._launch(w, grad, m, v, 400, 3, Rates(1e-2), out=(w, m, v))
    assert len(tried) == 3
    assert all(map(torch.equal, (w, m, v), want))


def test_lists_of_configurations_are_without_doubles():
    lists = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        if info.name.endswith(("_triton", "_launch", "_configs")):
            module = importlib.import_module(f"lorasurgery.kernels.{info.name}")
            for name, value in vars(module).items():
                if isinstance(value, tuple) and isinstance(value[0], Config):
                    lists[info.name, name] = value
    assert len(lists) > 15
    for where, configs in lists.items():
        assert len({json.dumps(c, sort_keys=True) for c in configs}) == len(configs) > 1, where


@pytest.mark.parametrize(("threads", "warps"), [(32, [8, 4]), (64, [4, 2])])
def test_warps_of_64_threads_are_half_as_many(threads, warps, monkeypatch):
    target = SimpleNamespace(warp_size=threads)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "driver", driver)
    configs = Config(SIZE=5, num_warps=8), Config(SIZE=6, num_warps=4)
    # the interpreter has no target
    assert of_32_threads(configs) == configs
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert [c["num_warps"] for c in of_32_threads(configs)] == warps
    assert [c["SIZE"] for c in of_32_threads(configs)] == [5, 6]


def test_a_block_larger_than_a_program_brings_as_many_more_warps():
    config = Config(WEIGHTS=1024, num_warps=4)
    assert _tuning.over_blocks(config, 64) == {"BLOCK": 64, "ROWS": 16, "num_warps": 4}
    assert _tuning.over_blocks(config, 4096) == {"BLOCK": 4096, "ROWS": 1, "num_warps": 16}
