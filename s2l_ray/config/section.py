"""What all sections of a config share."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["equal", "logarithmic", "early", "middle", "late"]


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def is_section(kind: Any) -> bool:
    """Whether a field's type is a section and not a value."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def types_of(annotation: Any) -> list[Any]:
    """The types that an annotation allows: the members of a union, without their bounds."""
    if get_origin(annotation) is Annotated:
        return types_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in types_of(member)]
    return [annotation]


def types_at(kind: Any, keys: Sequence[str]) -> list[Any]:
    """The types of the value that `keys` lead to from a section, or from a mapping; empty where they lead nowhere."""
    types = [kind]
    for key in keys:
        fields = [one.model_fields[key].annotation for one in types if is_section(one) and key in one.model_fields]
        fields += [get_args(one)[1] for one in types if get_origin(one) is dict]
        types = [inner for field in fields for inner in types_of(field)]
    return types


def fields_at(kind: Any, keys: Sequence[str]) -> list[str]:
    """The field names of the section that `keys` lead to, empty where they lead to no section."""
    return [name for one in types_at(kind, keys) if is_section(one) for name in one.model_fields]
