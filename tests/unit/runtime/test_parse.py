"""JSON into dataclasses."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import choose, nearest, parse, read_json


@dataclass(frozen=True)
class Inner:
    rate: float

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("the rate is negative")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    sides: int | tuple[int, int]
    mode: Literal["a", "b"] | None = None
    rates: tuple[Inner, ...] = ()


def test_values_become_what_the_hints_say() -> None:
    values = {"inner": {"rate": 1}, "sides": [2, 3], "mode": "b", "rates": [{"rate": 0.5}]}
    assert parse(Outer, values, "it") == Outer(Inner(1.0), (2, 3), "b", (Inner(0.5),))
    assert isinstance(parse(Outer, {"inner": {"rate": 1}, "sides": 4}, "it").inner.rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sides": True}, "it.sides is True, but must be"),
        ({"sides": [1]}, "it.sides is .1., but must be"),
        ({"mode": "c"}, "it.mode is 'c', but must be"),
        ({"inner": None}, "it.inner is None, but must be Inner"),
        ({"inner": {}}, "it.inner lacks the setting 'rate'"),
        ({"inner": {"rate": -1}}, "it.inner: the rate is negative"),
        ({"rates": [{"rate": 0}, {"rat": 0}]}, "it.rates.1 has no setting 'rat'; did you mean 'rate'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Outer, {"inner": {"rate": 1}, "sides": 4} | change, "it")


def test_only_a_table_is_read() -> None:
    assert read_json('{"a": 1}', "it") == {"a": 1}
    for text, message in (("{", "it is not valid JSON"), ("[]", "it must be a table of settings")):
        with pytest.raises(UserError, match=message):
            read_json(text, "it")


def test_nearest() -> None:
    assert nearest("sead", ["seed", "steps"]) == "did you mean 'seed'?"
    assert nearest("x", ["seed", "steps"]) == "choose one of: seed, steps."
    assert nearest("x", []) == "there is none."


def test_choose() -> None:
    assert choose({"euler": 1, "heun": 2}, "heun", "sampler") == 2
    with pytest.raises(UserError, match="There is no sampler 'huen'; did you mean 'heun'"):
        choose({"euler": 1, "heun": 2}, "huen", "sampler")
