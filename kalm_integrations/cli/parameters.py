"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter, Token, validators

_FACTORS: Final = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_LARGEST: Final = 10**15  # above, it is a slip


def existing_path(_: type, tokens: Sequence[Token]) -> Path:
    """Read a path to something that exists; `~` is the user's home.

    Raises:
        ValueError: There is no such file or folder.
    """
    value = tokens[-1].value
    shown = value if len(value) < 100 else f"{value[:100]}…"
    try:
        path = Path(value).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long; ~ of an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{shown}: {reason}") from None
    if not exists:
        raise ValueError(f"there is no {shown}")
    return path


def count(_: type, tokens: Sequence[Token]) -> int:
    """Read a whole number like "500_000", "500,000", "500k", "1.5M" or "2B".

    Raises:
        ValueError: It is none, or is not from 1 to 10^15.
    """
    value = tokens[-1].value
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kMB]?)", value)
    number = float(re.sub("[_,]", "", match[1])) * _FACTORS[match[2]] if match else 0.0
    if not (1 <= number <= _LARGEST and number == round(number)):
        raise ValueError(
            f"{value!r} is not a whole number from 1 to {_LARGEST:,}, like 500000, 500k, 1.5M or 2B"
        )
    return round(number)


def between(low: int, high: int | None = None) -> Any:
    """The validator of a number in a range; None is no limit."""
    return validators.Number(gte=low, lte=high)


def positive(_: type, value: float | None) -> None:
    """The validator of an amount.

    Raises:
        ValueError: It is not a number above 0.
    """
    if value is not None and not 0 < value < float("inf"):  # NaN too
        raise ValueError("Must be a number above 0.")


def names(_: type, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Read names with commas between them.

    Raises:
        ValueError: There are none.
    """
    values = tuple(part.strip() for part in tokens[-1].value.split(",") if part.strip())
    if not values:
        raise ValueError("it names none")
    return values


def _check_share(_: type, value: float) -> None:
    if not 0 < value <= 1:  # NaN too
        raise ValueError("Must be > 0 and <= 1.")


Json = Annotated[
    bool, Parameter(name="--json", help="Print one JSON document to stdout, also for an error.")
]
TextColumn = Annotated[
    str | None,
    Parameter(name="--text-column", help="Field that holds the text, default: text."),
]
ExistingPath = Annotated[Path, Parameter(converter=existing_path)]
Count = Annotated[int, Parameter(converter=count)]
Share = Annotated[float, Parameter(validator=_check_share)]
Gpus = Annotated[tuple[str, ...], Parameter(name="--gpu", converter=names, n_tokens=1)]
Canary = Literal["refuse", "warn"]
