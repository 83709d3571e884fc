"""Settings that pydantic checks, and whose faults are named in our words."""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from offprincipal.errors import OffPrincipalError, meant

_SHOWN = 60  # letters of a value in a message
# what pydantic calls a kind of value, and what we call it
_PLAIN = {
    "integer": "an integer",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "tuple": "a list",
}


Place = tuple[int | str, ...]


def faults_told(error: ValidationError, named: Callable[[Place], str], unknown: Callable[[str], str]) -> str:
    """All that is wrong, each setting once, in our words.

    Args:
        named: where pydantic found a fault -> what the setting there is called.
        unknown: a name that is no setting -> what to say of it.
    """
    told: dict[str, list[str]] = {}
    for fault in error.errors():
        name = named(fault["loc"])
        is_unknown = fault["type"] == "extra_forbidden"
        told.setdefault(name, []).append(unknown(name) if is_unknown else fault_of_value(name, fault))
    return "; ".join(f"{name}: {'; or '.join(dict.fromkeys(each))}" for name, each in told.items())


def fault_of_value(name: str, fault: Mapping[str, Any]) -> str:
    """What is wrong with a value that is missing or refused.

    Args:
        name: of the setting; fault: one of the `errors()` of pydantic's ValidationError.

    >>> fault_of_value("steps", {"type": "int_type", "msg": "Input should be a valid integer", "input": "many"})
    "it must be an integer, not 'many'"
    """
    said = _in_short(fault["input"])
    if fault["type"] == "missing":
        return "it is missing: give it a value"
    if fault["type"] == "union_tag_not_found":
        return f"its {fault['ctx']['discriminator']} is missing: name one".replace("'", "")
    if fault["type"] in ("literal_error", "union_tag_invalid"):
        known = re.findall(r"'([^']*)'", str(fault["ctx"].get("expected") or fault["ctx"]["expected_tags"]))
        given, kind = fault["ctx"].get("tag", fault["input"]), str(fault["ctx"].get("discriminator", "")).strip("'")
        hint = meant(str(given), known, "choose one of " + ", ".join(known))
        return f"there is no {f'{kind} ' if kind else ''}{_in_short(given)}: {hint}"
    if fault["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return f"it takes settings under it, as {name}.KEY=VALUE"
    must = re.sub("(, (unable to|got a) | after validation).*", "", fault["msg"])
    must = re.sub(r"^\w+ should", "it must", must)
    for theirs, ours in _PLAIN.items():
        must = must.replace(f"a valid {theirs}", ours)
    return must if said is None else f"{must}, not {said}"


def _in_short(value: Any) -> str | None:
    """A value as a settings file has it; None where a message has no room for it."""
    if value is None:
        return "nothing"
    short = isinstance(value, bool | int | float | str) and len(str(value)) <= _SHOWN
    return (str(value).lower() if isinstance(value, bool) else repr(value)) if short else None


class PlainSettings(BaseModel):
    """Settings that do not change once made, and refuse names and values that they do not know.

    Attributes:
        called: what the message calls them; under: what their names stand under, such as `adapter.`, or nothing.
        refusal: the error to raise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    called: ClassVar[str]
    under: ClassVar[str] = ""
    refusal: ClassVar[type[OffPrincipalError]]

    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        """What is given, before it is checked."""
        return given

    @classmethod
    def _unknown(cls, name: str) -> str:
        """What to say of a name that is not a setting."""
        known = [cls.under + field for field in cls.model_fields]
        return f"there is no such setting: {meant(name, known, '`train --list settings` has all')}"

    @model_validator(mode="wrap")
    @classmethod
    def _told_what_was_meant(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        given = cls._by_our_names(given)
        try:
            return validate(given)
        except ValidationError as error:
            told = faults_told(error, cls._named, cls._unknown)
        raise cls.refusal(f"{cls.called} are not usable: {told}")  # pydantic's own message says no more

    @classmethod
    def _named(cls, place: Place) -> str:
        """A setting by its name; the kinds that pydantic tried, which stand behind it, are left out."""
        first, *rest = place or (cls.under.rstrip(".") or "settings",)
        under = cls.under if place else ""
        return ".".join([f"{under}{first}", *(str(part) for part in rest if isinstance(part, int))])


class NestedSettings(PlainSettings):
    """Settings under a setting, of which those that are not given are not recorded."""

    @model_serializer(mode="wrap")
    def _what_is_given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = whole(self)
        return {name: value for name, value in values.items() if value is not None}
