"""Every example in a docstring runs and shows what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import anatomaly

PACKAGE = Path(anatomaly.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if ">>>" in file.read_text("utf-8"))
MODULES = [".".join(("anatomaly", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in FILES]


def test_there_are_examples():
    assert len(MODULES) > 10


@pytest.mark.parametrize("name", MODULES)
def test_examples_show_what_they_say(name):
    module = import_module(name.removesuffix(".__init__"))
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed
