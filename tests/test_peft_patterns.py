"""Which pattern or name of PEFT's config a module has, against regular expressions tried one after another."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorasurgery.dialects._peft_lora_patterns import fitting, listed
from lorasurgery.errors import FormatError

Q = "model.layers.1.self_attn.q_proj"
MODULES = [Q, "layers.1.self_attn.q_proj", "q_proj", "xq_proj", "model.layers.11.self_attn.q_proj"]


def one_by_one(patterns: dict[str, Any], module: str) -> Any:
    """As PEFT: the first whose regular expression fits, after nothing or a dot."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), "none")


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1}, {f"^{Q}": 1}, {"^q_proj": 1}, {Q: 1, "q_proj": 2}, {"q_proj": 2, Q: 1},
        {r".*\.1\..*": 1, Q: 2}, {Q: 2, r".*\.1\..*": 1}, {"1.self_attn.q_proj": 3, "proj": 4},
        {"(q|k)_proj": 5, "q_proj": 6}, {"k_proj": 7, "(v|q)_proj": 8, "self_attn.q_proj": 9}, {},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("module", MODULES)
def test_the_first_that_fits_is_the_one(patterns: dict[str, Any], module: str) -> None:
    assert fitting(patterns, module, "none") == one_by_one(patterns, module)


def test_a_name_is_the_path_or_what_follows_a_dot() -> None:
    names = ["q_proj", "layers.11.self_attn.k_proj"]
    assert [listed(names, m) for m in MODULES] == [True, True, True, False, True]
    assert listed(names, "model.layers.11.self_attn.k_proj")
    assert not listed(names, "model.layers.1.self_attn.k_proj")


def test_paths_in_thousands_are_each_looked_at_once() -> None:
    paths = [f"model.layers.{i // 64}.mlp.experts.{i % 64}.up_proj" for i in range(20_000)]
    patterns = {f"^{path}": i for i, path in enumerate(paths)}
    names = Counted(paths)
    assert all(listed(names, path) for path in paths)
    assert names.walks == 1
    assert [fitting(patterns, path, None) for path in paths] == list(range(20_000))


class Counted(list[str]):
    """Names that know how often they were walked through."""

    walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()


def test_a_broken_pattern_is_one_error() -> None:
    with pytest.raises(FormatError) as caught:
        fitting({"q_(proj": 1}, Q, None)
    assert str(caught.value).startswith("adapter_config.json: '(.*\\\\.)?(q_(proj)$' is no regular")
