"""Parameters: a method's keyword arguments, checked and read before any work."""

import sys
from typing import Annotated

import pytest

from forgetfilter.errors import ConfigError
from forgetfilter.methods import (
    Least,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    arguments,
    constants,
    require_known,
)


def method(
    workshop, data, config, *, share: float = 0.5, steps: int = 3, file: str, note: str | None = None, loud=True
):
    """Takes parameters of many types."""


def typed(workshop, data, config, *, share: float = 0.5, least: float | None = 0.1, loud: bool = False):
    """Has a default for each parameter."""


def postponed(workshop, data, config, *, share: "float" = 0.5, note: "str | None" = None):
    """As in a file with `from __future__ import annotations`."""


def limited(
    workshop,
    data,
    config,
    *,
    steps: PositiveInt = 3,
    layers: NonNegativeInt | None = None,
    rate: PositiveFloat = 0.1,
    weight: NonNegativeFloat = 0,
    folds: "Annotated[int, Least(2)]" = 5,
):
    """Has a least value for each parameter."""


def bare(workshop, data, config):
    """Has no parameters."""


def test_every_parameter_has_a_value_the_one_given_or_its_default():
    assert arguments("typed", typed, None) == {"share": 0.5, "least": 0.1, "loud": False}
    assert arguments("typed", typed, {"typed": {"share": 0.25}, "other": {"speed": 1}})["share"] == 0.25
    assert arguments("typed", typed, {"typed": None}) == arguments("typed", typed, {})
    assert arguments("bare", bare, {}) == {}
    found = arguments("method", method, {"method": {"file": "a.jsonl"}})
    assert {name: found[name] for name in ("share", "steps", "file", "note")} == {
        "share": 0.5,
        "steps": 3,
        "file": "a.jsonl",
        "note": None,
    }


@pytest.mark.parametrize(
    ("key", "least", "wrong", "says"),
    [
        ("steps", 1, 0, "it must be 1 or more"),
        ("layers", 0, -1, "it must be 0 or more"),
        ("layers", None, "-2", "it must be 0 or more"),
        ("rate", 1e-9, 0, "it must be above 0"),
        ("rate", 1e-9, float("nan"), "it must be above 0"),
        ("weight", 0, -0.1, "it must be 0 or more"),
        ("folds", 2, "1", "it must be 2 or more"),
        ("steps", "1", "1.5", "it must be a value of type int"),
    ],
)
def test_a_value_below_the_least_is_refused_before_any_work(key, least, wrong, says):
    arguments("m", limited, {"m": {key: least}})
    with pytest.raises(ConfigError, match=rf"parameters\.m\.{key} is .*{says}"):
        arguments("m", limited, {"m": {key: wrong}})


@pytest.mark.parametrize("of", [typed, postponed])
@pytest.mark.parametrize("given", ["0.1", 0.1, "1e-1"])
def test_a_number_left_as_text_is_read(of, given):
    value = arguments("m", of, {"m": {"share": given}})["share"]
    assert value == 0.1
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("share", 1, 1.0),
        ("share", "2", 2.0),
        ("least", None, None),
        ("least", "0.3", 0.3),
        ("loud", True, True),
        ("loud", "false", False),
        ("loud", "true", True),
    ],
)
def test_values_are_taken_as_their_parameter_wants_them(key, given, value):
    found = arguments("typed", typed, {"typed": {key: given}})[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("given", "value"), [(7, 7), ("7", 7), (7.0, 7)])
def test_a_whole_number_is_one(given, value):
    found = arguments("method", method, {"method": {"file": "a", "steps": given}})["steps"]
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("share", "much", "float"),
        ("share", True, "float"),
        ("share", None, "float"),
        ("share", [0.1], "float"),
        ("share", {"a": 1}, "float"),
        ("least", "much", "float or NoneType"),
        ("loud", 1, "bool"),
        ("loud", "yes", "bool"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(key, given, wanted):
    with pytest.raises(ConfigError, match=rf"parameters\.typed\.{key} is .*: it must be a value of type {wanted}\."):
        arguments("typed", typed, {"typed": {key: given}})


@pytest.mark.parametrize("given", [3.5, "3.5", "nan", "inf", True])
def test_a_number_that_is_not_whole_is_refused_where_one_is_wanted(given):
    with pytest.raises(ConfigError, match=r"parameters\.method\.steps is .*type int\."):
        arguments("method", method, {"method": {"file": "a", "steps": given}})


@pytest.mark.parametrize("given", ["nan", float("inf")])
def test_a_number_is_finite(given):
    with pytest.raises(ConfigError, match=r"parameters\.typed\.share is .*: it must be a finite number"):
        arguments("typed", typed, {"typed": {"share": given}})


@pytest.mark.parametrize("given", [3, None, True])
def test_a_text_is_one(given):
    with pytest.raises(ConfigError, match=r"parameters\.method\.file is .*type str\."):
        arguments("method", method, {"method": {"file": given}})


def test_an_unknown_parameter_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ConfigError, match=r"parameters\.typed: no parameter speed, 3; it has share, least, loud\."):
        arguments("typed", typed, {"typed": {"speed": 1, "share": 0.1, 3: 1}})
    with pytest.raises(ConfigError, match=r"parameters\.bare: no parameter share; it has none\."):
        arguments("bare", bare, {"bare": {"share": 1}})
    with pytest.raises(ConfigError, match="no parameter config"):  # what every method is given is no parameter
        arguments("bare", bare, {"bare": {"config": 1}})


def test_a_missing_parameter_is_named_with_what_to_write():
    with pytest.raises(ConfigError, match=r"method needs file: .*`parameters: \{method: \{file: VALUE\}\}`"):
        arguments("method", method, {"method": {"share": 0.1}})


def test_parameters_of_a_method_that_does_not_exist_are_refused():
    require_known(None, ["typed"])
    require_known({"typed": {"share": "much"}}, ["typed", "bare"])
    with pytest.raises(ConfigError, match="no filter or defense speedy, 3; there are typed, bare"):
        require_known({"typed": {}, "speedy": {}, 3: {}}, ["typed", "bare"])


def test_constants_are_the_numbers_and_texts_in_capitals_where_a_method_is_defined(monkeypatch):
    from forgetfilter.filters import FILTERS

    method = FILTERS["forgetting"]
    found = constants(method)
    assert found["filters.forgetting.FIRM_WEIGHT"] == 0.6
    assert found["filters.forgetting.LEAST_STEPS"] == 20
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())
    assert constants(sys.modules[method.__module__]) == found
    monkeypatch.setitem(method.__globals__, "LEAST_STEPS", 30)
    assert constants(method) == {**found, "filters.forgetting.LEAST_STEPS": 30}


@pytest.mark.parametrize("named", [{}, {"__name__": "never_imported"}])
def test_constants_of_a_method_that_was_run_without_being_imported(named):
    exec("MOST = 3\nleast = 2\nKINDS = ['a']\ndef mine(workshop, data, config): ...", namespace := {**named})
    found = constants(namespace["mine"])
    assert list(found.values()) == [3]
    assert next(iter(found)).endswith(".MOST")
