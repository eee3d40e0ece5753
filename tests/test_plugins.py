"""Every file in a plug-in folder offers what its protocol asks for, parameter by parameter."""

from inspect import getdoc, signature
from types import ModuleType

import pytest

from lorasurgery import plugins
from lorasurgery.adapter import Dialect, Variant
from lorasurgery.checkpoint import Format
from lorasurgery.codec import Codec
from lorasurgery.errors import UnknownNameError

PROTOCOLS = {"adapters": Variant, "codecs": Codec, "dialects": Dialect, "formats": Format}


def modules(kind: str) -> list[ModuleType]:
    """All plug-ins of a kind, each a test of its own."""
    return [
        pytest.param(plugins.load(kind, name), id=f"{kind}/{name}") for name in plugins.names(kind)
    ]


@pytest.mark.parametrize(
    ("protocol", "module"),
    [
        pytest.param(protocol, module.values[0], id=module.id)
        for kind, protocol in PROTOCOLS.items()
        for module in modules(kind)
    ],
)
def test_module_keeps_its_contract(protocol, module):
    for name, wanted in vars(protocol).items():
        if name.startswith("_"):
            continue
        offered = getattr(module, name)
        if isinstance(wanted, property):
            assert not callable(offered), name
        elif callable(wanted):
            asked = list(signature(wanted).parameters)[1:]
            assert list(signature(offered).parameters) == asked, name


@pytest.mark.parametrize("module", modules("kernels"))
def test_kernel_offers_a_reference_with_the_same_call_and_cases(module):
    assert signature(module.reference).parameters.keys() == signature(module.run).parameters.keys()
    assert callable(module.cases)


@pytest.mark.parametrize("name", [name for name in plugins.names("cli") if name != "app"])
def test_command_says_what_it_does_in_a_line_and_gives_an_example(name):
    lines = (getdoc(plugins.load("cli", name).command) or "").splitlines()
    assert 0 < len(lines[0]) <= 100
    assert any(f"lorasurgery {name} " in line for line in lines[1:])


@pytest.mark.parametrize("kind", [*PROTOCOLS, "kernels", "cli"])
def test_every_plugin_says_what_it_is(kind):
    for name in plugins.names(kind):
        assert plugins.load(kind, name).__doc__, f"{kind}/{name}"


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^codecs: no 'nf3'\. Did you mean 'nf4'\?$"):
        plugins.load("codecs", "nf3")
