"""JSON into dataclasses, strictly: a mistyped name or a value of another type is an error and never a default."""

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from micro_diffusion.runtime.files import UserError, user_error

T = TypeVar("T")


def read_json(text: str, where: str) -> dict[str, Any]:
    """The table that the text holds; UserError if it holds none."""
    with user_error(f"{where} is not valid JSON ({{}}); write or copy it again.", ValueError):
        values = json.loads(text)
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a table of settings, not {values!r}.")
    return values


def parse(hint: Any, value: Any, where: str) -> Any:
    """Turn a JSON value into the type `hint`; UserError says where it does not fit, or why the type refuses it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _parse_dataclass(hint, value, where)
    if origin in (Union, types.UnionType):
        for option in arguments:
            if _fits(option, value):
                return parse(option, value, where)
    if origin is tuple and isinstance(value, list):
        parts = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(parts) == len(value):
            pairs = enumerate(zip(parts, value, strict=True))
            return tuple(parse(part, item, f"{where}.{i}") for i, (part, item) in pairs)
    if origin in (None, Literal) and _fits(hint, value):
        return float(value) if hint is float else value
    expected = " or ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where} is {value!r}, but must be {expected}.")


def choose(table: Mapping[str, T], name: str, kind: str) -> T:
    """The table's entry of that name; UserError with the nearest name, or all of them."""
    if name not in table:
        raise UserError(f"There is no {kind} {name!r}; {nearest(name, table)}")
    return table[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` or the list of what there is, for an error message."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"choose one of: {', '.join(known)}." if known else "there is none."


def _parse_dataclass(cls: type, values: dict[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values.keys() - fields.keys():
        raise UserError(f"{where} has no setting {key!r}; {nearest(key, fields)}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} lacks the setting {name!r}.")
    hints = get_type_hints(cls)
    with user_error(f"{where}: {{}}.", ValueError):
        return cls(**{key: parse(hints[key], item, f"{where}.{key}") for key, item in values.items()})


def _fits(hint: Any, value: Any) -> bool:
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return isinstance(value, list if get_origin(hint) is tuple else hint)
