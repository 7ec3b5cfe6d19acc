"""Errors: their classes, their messages, and that copies are complete."""

from __future__ import annotations

import copy
import pickle
import traceback

import numpy as np
import pytest

from kalm_integrations import errors
from kalm_integrations.errors import InvalidInputError, InvalidText, KalmError
from kalm_integrations.result import PartialResult

INVALID = (InvalidText(3, "is empty"), InvalidText(8, "is None, not a string"))


def family(cls: type[KalmError] = KalmError) -> list[type[KalmError]]:
    """Every error of the package, so that a new one is tested without being listed here."""
    members = [cls, *(member for child in cls.__subclasses__() for member in family(child))]
    return [member for member in dict.fromkeys(members) if member.__module__ == errors.__name__]


def example(cls: type[KalmError]) -> KalmError:
    """An error with everything that one of its class can carry."""
    if issubclass(cls, InvalidInputError | errors.InvalidResponseError):
        error = cls("It happened.", INVALID)
    elif issubclass(cls, errors.ServiceUnavailableError):
        error = cls("It happened.", retry_after=2.5)
    else:
        error = cls("It happened.")
    error.partial = PartialResult(3, np.array([0, 2]), np.eye(2, 4, dtype=np.float32))
    return error


ALL = pytest.mark.parametrize("cls", family(), ids=lambda cls: cls.__name__)


@ALL
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *(
            pytest.param(lambda e, p=p: pickle.loads(pickle.dumps(e, p)), id=f"pickle-{p}")
            for p in range(2, pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_copies_and_pickles_are_complete(cls, duplicate):
    error = example(cls)
    twin = duplicate(error)
    assert type(twin) is cls
    assert str(twin) == str(error)
    assert vars(twin).keys() == vars(error).keys()
    assert getattr(twin, "invalid", None) == getattr(error, "invalid", None)
    assert getattr(twin, "retry_after", None) == getattr(error, "retry_after", None)
    assert twin.partial.missing.tolist() == [1]
    assert twin.partial.vectors.tolist() == error.partial.vectors.tolist()


@ALL
def test_a_traceback_ends_with_the_message_and_the_remedy(cls):
    (line,) = traceback.format_exception_only(example(cls))
    assert line.rstrip().endswith(f": It happened. {cls.remedy}".rstrip())


@ALL
def test_a_new_error_has_no_partial_result(cls):
    assert cls("It happened.").partial is None


@ALL
def test_only_temporary_errors_are_retryable(cls):
    temporary = errors.ServiceUnavailableError | errors.CorruptedAnswerError
    assert cls.retryable == issubclass(cls, temporary)


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.InvalidInputError, ValueError),
        (errors.InvalidArgumentError, errors.InvalidInputError),
        (errors.InputTooLongError, errors.InvalidInputError),
        (errors.DeadlineExceededError, TimeoutError),
    ],
)
def test_an_error_is_caught_as_its_built_in_base(cls, base):
    with pytest.raises(base):
        raise cls("It happened.")


def test_modals_own_sign_in_advice_is_cut():
    error = errors.ModalTokenError("Token missing. If you have token credentials, do this.")
    assert error.message == "Token missing."


@pytest.mark.parametrize(("count", "rest"), [(1, ""), (5, ""), (6, "1 more"), (900, "895 more")])
@pytest.mark.parametrize(
    "cls", [InvalidInputError, errors.InputTooLongError, errors.InvalidResponseError]
)
def test_the_message_names_five_texts_and_the_attribute_all(cls, count, rest):
    invalid = [InvalidText(index, "is empty") for index in range(count)]
    error = cls.of(invalid)
    assert type(error) is cls
    assert error.message.count("is empty") == min(count, 5)
    assert error.message.startswith("texts[0] is empty")
    assert rest in error.message
    assert error.invalid == tuple(invalid)


def test_an_error_keeps_its_own_list_of_texts():
    invalid = list(INVALID)
    error = InvalidInputError.of(invalid)
    invalid.clear()
    assert error.invalid == INVALID
