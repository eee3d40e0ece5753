"""Every file in a plug-in folder offers what its protocol asks for, parameter by parameter."""

from inspect import getdoc, signature

import pytest

from lorasurgery import plugins
from lorasurgery.adapter import Dialect, Variant
from lorasurgery.checkpoint import Format
from lorasurgery.codec import Codec
from lorasurgery.errors import UnknownNameError
from lorasurgery.export._target import Target
from lorasurgery.training.method import Method
from lorasurgery.training.optimizer import Kind

PROTOCOLS = {
    "adapters": Variant,
    "codecs": Codec,
    "dialects": Dialect,
    "export": Target,
    "formats": Format,
    "training.methods": Method,
    "training.optimizers": Kind,
}


def every(*kinds: str) -> list[tuple[str, str]]:
    """All plug-ins of these kinds, each a test of its own; loaded in it, not before."""
    return [
        pytest.param(kind, name, id=f"{kind}/{name}")
        for kind in kinds
        for name in plugins.names(kind)
    ]


@pytest.mark.parametrize(("kind", "name"), every(*PROTOCOLS))
def test_module_keeps_its_contract(kind, name):
    module = plugins.load(kind, name)
    for member, wanted in vars(PROTOCOLS[kind]).items():
        if member.startswith("_"):
            continue
        offered = getattr(module, member)
        if isinstance(wanted, property):
            assert isinstance(offered, type) or not callable(offered), member
        elif callable(wanted):
            asked = list(signature(wanted).parameters)[1:]
            assert list(signature(offered).parameters) == asked, member


@pytest.mark.parametrize(("kind", "name"), every("kernels"))
def test_kernel_offers_cases_and_a_reference_with_the_same_call(kind, name):
    kernel = plugins.load(kind, name)
    assert list(signature(kernel.reference).parameters) == list(signature(kernel.run).parameters)
    assert callable(kernel.cases)


@pytest.mark.parametrize("name", [name for name in plugins.names("cli") if name != "app"])
def test_command_says_what_it_does_in_a_line_and_gives_an_example(name):
    lines = (getdoc(plugins.load("cli", name).command) or "").splitlines()
    assert 0 < len(lines[0]) <= 100
    typed = name.replace("_", "-")
    assert any(f"lorasurgery {typed} " in line for line in lines[1:])


@pytest.mark.parametrize(("kind", "name"), every(*PROTOCOLS, "kernels", "cli"))
def test_plugin_says_what_it_is(kind, name):
    assert plugins.load(kind, name).__doc__


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^codecs: no 'nf3'\. Did you mean 'nf4'\?$"):
        plugins.load("codecs", "nf3")
