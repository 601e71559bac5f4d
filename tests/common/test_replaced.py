import os

import pytest

from ds_cmli.common.replaced import environment, replaced


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
