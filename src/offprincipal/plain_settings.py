"""Settings that pydantic checks, and whose faults are named in our words."""

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
            faults = [(cls.under + ".".join(map(str, fault["loc"])), fault) for fault in error.errors()]
        told = (
            f"{name.rstrip('.') or 'settings'}: "
            f"{cls._unknown(name) if fault['type'] == 'extra_forbidden' else fault['msg']}"
            for name, fault in faults
        )
        raise cls.refusal(f"{cls.called} are not usable: {'; '.join(told)}")  # pydantic's own message says no more


class NestedSettings(PlainSettings):
    """Settings under a setting, of which those that are not given are not recorded."""

    @model_serializer(mode="wrap")
    def _what_is_given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = whole(self)
        return {name: value for name, value in values.items() if value is not None}
