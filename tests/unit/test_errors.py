"""Errors: what they say, what they are, and that they arrive whole in another process."""

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
def test_an_error_is_whole_after_copying_and_pickling(cls, duplicate):
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
def test_a_traceback_ends_with_what_happened_and_what_to_do_next(cls):
    (line,) = traceback.format_exception_only(example(cls))
    assert line.rstrip().endswith(f": It happened. {cls.remedy}".rstrip())


@ALL
def test_a_remedy_is_whole_sentences(cls):
    assert not cls.remedy or (cls.remedy[0].isupper() and cls.remedy.endswith("."))


def test_an_error_without_a_message_is_its_remedy():
    assert str(errors.RequestTooLargeError()) == "Lower batch_size."


@ALL
def test_an_error_that_embedded_nothing_has_no_partial(cls):
    assert cls("It happened.").partial is None


@ALL
def test_only_what_may_pass_is_retried(cls):
    passing = errors.ServiceUnavailableError | errors.CorruptedAnswerError
    assert cls.retryable == issubclass(cls, passing)


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
def test_an_error_is_caught_as_the_built_in_that_it_is(cls, base):
    with pytest.raises(base):
        raise cls("It happened.")


def test_what_waiting_may_mend_is_no_value_error():
    with pytest.raises(errors.ServiceUnavailableError) as caught:
        raise errors.ServiceUnavailableError("It happened.")
    assert not isinstance(caught.value, ValueError)
    assert caught.value.retry_after is None


@pytest.mark.parametrize(
    ("count", "ending"),
    [
        (1, "texts[0] is empty."),
        (5, "texts[4] is empty."),
        (6, "; and 1 more."),
        (900, "; and 895 more."),
    ],
)
@pytest.mark.parametrize(
    "cls", [InvalidInputError, errors.InputTooLongError, errors.InvalidResponseError]
)
def test_the_message_names_five_texts_and_the_attribute_all(cls, count, ending):
    invalid = [InvalidText(index, "is empty") for index in range(count)]
    error = cls.of(invalid)
    assert type(error) is cls
    assert error.args[0].count("is empty") == min(count, 5)
    assert error.args[0].startswith("texts[0] is empty")
    assert str(error).endswith(f"{ending} {cls.remedy}")
    assert error.invalid == tuple(invalid)


def test_an_error_keeps_its_own_list_of_texts():
    invalid = list(INVALID)
    error = InvalidInputError.of(invalid)
    invalid.clear()
    assert error.invalid == INVALID
