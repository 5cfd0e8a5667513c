"""The checker that unit tests put on every annotated function of the package (tests/unit/conftest.py)."""

from collections.abc import Callable
from io import TextIOBase
from typing import Any, Self, TextIO

from beartype import BeartypeConf, FrozenDict, beartype

# An int is a float, as everywhere in Python; Self is only known inside a class, and functions are checked one by one;
# beartype takes no stream for a TextIO, sys.stderr included.
typed = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any, TextIO: TextIOBase})))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results, shapes included; a hint in quotes, which only a type checker looks up, is let be."""
    hints = function.__annotations__
    function.__annotations__ = {name: Any if isinstance(hint, str) else hint for name, hint in hints.items()}
    return typed(function)
