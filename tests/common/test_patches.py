"""Replacing attributes and variables for a while; patches of libraries."""

import os

import pytest
import torch.nn.functional as F

from ds_cmli.common.patches import PATCHES, environment, patched, replaced


class Base:
    def method(self) -> str:
        return "base"


class Derived(Base):
    @staticmethod
    def static() -> str:
        return "static"


def test_what_was_inherited_is_inherited_again():
    thing = Derived()
    with pytest.raises(ZeroDivisionError), replaced(thing, "method", lambda: "mine"):
        assert thing.method() == "mine"
        raise ZeroDivisionError
    assert thing.method() == "base" and "method" not in vars(thing)


def test_a_static_method_stays_one():
    with replaced(Derived, "static", staticmethod(lambda: "mine")):
        assert Derived().static() == "mine"
    assert Derived().static() == "static" and isinstance(vars(Derived)["static"], staticmethod)


def test_variables_that_were_not_set_are_not_afterwards(monkeypatch):
    monkeypatch.setenv("DS_CMLI_TEST_A", "before")
    monkeypatch.delenv("DS_CMLI_TEST_B", raising=False)
    with environment({"DS_CMLI_TEST_A": "inside", "DS_CMLI_TEST_B": "inside"}):
        assert os.environ["DS_CMLI_TEST_A"] == os.environ["DS_CMLI_TEST_B"] == "inside"
    assert os.environ["DS_CMLI_TEST_A"] == "before" and "DS_CMLI_TEST_B" not in os.environ


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_has_a_reason_and_what_it_replaces_is_there(name):
    patch = PATCHES[name]
    assert patch.targets() and patch.reason


def test_a_patch_wraps_what_was_there_and_ends():
    before = F.linear
    with patched("torch: linear", lambda original: lambda values: (original, values)):
        assert F.linear([1]) == (before, [1])
    assert F.linear is before
