"""Frozen dataclasses to JSON and back, as their annotations say."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from m2m_hf.core.mixture import Mixture

T = TypeVar("T")
OPTIONAL = {"optional": True}  # metadata of a field that is left out where it is empty; `name` gives it another name


@dataclass(frozen=True)
class Measurement:
    """A value with its standard error, None where that is not known."""

    value: float
    stderr: float | None = None


def json_name(item: "Field[Any]") -> str:
    return str(item.metadata.get("name", item.name))


def to_json(value: Any) -> Any:
    """What `json.dumps` takes. A number that is not finite becomes null, a mixture its weights."""
    if isinstance(value, Mixture):
        return value.weights
    if is_dataclass(value):
        pairs = [(item, getattr(value, item.name)) for item in fields(value)]
        return {json_name(item): to_json(one) for item, one in pairs if one or not item.metadata.get("optional")}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(kind: type[T], value: Any) -> T:
    """The inverse of `to_json`: null for a plain number is the field's default, or NaN. Other keys are ignored.

    Raises ValueError if the value is not of this kind.
    """
    return cast(T, decode(kind, value))


def decode(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (one for one in arguments if one is not type(None))
        return None if value is None else decode(inner, value)
    if kind is float:
        expect(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)), "a number", value)
        return math.nan if value is None else value
    if kind is Mixture or is_dataclass(kind) or origin is Mapping:
        expect(isinstance(value, Mapping), "an object", value)
        if kind is Mixture:
            return Mixture.of({name: decode(float, weight) for name, weight in value.items()})
        if origin is Mapping:
            return {arguments[0](key): decode(arguments[1], one) for key, one in value.items()}
        return decode_fields(kind, value)
    if origin in (tuple, frozenset):
        expect(isinstance(value, (list, tuple)), "a list", value)
        if origin is frozenset or arguments[-1] is ...:
            return origin(decode(arguments[0], one) for one in value)
        return tuple(decode(one, part) for one, part in zip(arguments, value, strict=True))
    expect(isinstance(value, kind), kind.__name__, value)
    return value


def decode_fields(kind: Any, value: Mapping[str, Any]) -> Any:
    made = {}
    for item, hint in hints(kind):
        name, has_default = json_name(item), (item.default, item.default_factory) != (MISSING, MISSING)
        if has_default and (name not in value or (hint is float and value[name] is None)):
            continue
        if name not in value:
            raise ValueError(f"{kind.__name__}: {name} is missing")
        made[item.name] = decode(hint, value[name])
    return kind(**made)


@cache
def hints(kind: Any) -> list[tuple["Field[Any]", Any]]:
    """(field, annotation) of a dataclass; finding them takes longer than all else."""
    annotations = get_type_hints(kind)
    return [(item, annotations[item.name]) for item in fields(kind)]


def expect(right: bool, words: str, value: Any) -> None:
    if not right:
        raise ValueError(f"expected {words}, got {value!r:.80}")


def is_number(value: Any) -> bool:
    """True for finite integers and floats, however many digits they have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
