"""What may stand in a study's entries? Numbers as decimal strings, counts, labels, and sections that allow no other."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction as Rational
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _decimal(value: Any) -> Any:
    """A real number as the shortest plain decimal string: 0.001, 1e-3 and "0.0010" are one value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number is expected")
    try:
        number = Decimal(str(value))
    except InvalidOperation as error:
        raise ValueError(f"{value!r} is not a number") from error
    if not number.is_finite() or number.adjusted() > 15 or number.adjusted() < -15:
        raise ValueError(f"{value!r} is out of range")
    text = format(number.normalize(), "f")
    return "0" if text in {"-0", "0"} else text


def _between(low: str, high: str, *, above: bool = False) -> AfterValidator:
    def check(value: str) -> str:
        number = Decimal(value)
        if number > Decimal(high) or number < Decimal(low) or (above and number == Decimal(low)):
            raise ValueError(
                f"{value} is not {'above' if above else 'from'} {low} {'and up to' if above else 'to'} {high}"
            )
        return value

    return AfterValidator(check)


Real = Annotated[str, BeforeValidator(_decimal)]
Positive = Annotated[Real, _between("0", "1e12", above=True)]
NonNegative = Annotated[Real, _between("0", "1e12")]
Fraction = Annotated[Real, _between("0", "1")]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Label = Annotated[str, Field(min_length=1, max_length=80)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def _parameters(value: Any) -> Any:
    """Free parameters: text, whole numbers, truth values, and lists of them; a real number becomes text."""
    if isinstance(value, float):
        return _decimal(value)
    if isinstance(value, dict):
        return {key: _parameters(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_parameters(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"{type(value).__name__} cannot stand in a study")


Parameters = Annotated[dict[str, Any], BeforeValidator(_parameters)]


class Section(BaseModel):
    """A part of a study: frozen, and no entry that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def decimal_fraction(text: str) -> Rational:
    """A decimal string as the exact fraction that it names."""
    return Rational(text)
