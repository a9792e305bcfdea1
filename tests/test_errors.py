"""The errors a user catches: one class per cause, each with a code, a docstring and whose fault it is."""

import pytest
import ralmq.errors
from ralmq.schema import errors
from ralmq.schema.errors import CLASSES, RalmqError, error_of

FOUND = {
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RalmqError)
}  # what the module defines, whether or not it is in the table


def test_every_class_has_a_code_of_its_own_and_is_in_the_table() -> None:
    assert set(CLASSES.values()) == FOUND
    assert len({cls.code for cls in FOUND}) == len(FOUND) == 12


@pytest.mark.parametrize("code", sorted(CLASSES))
def test_a_code_becomes_its_class_and_back(code: str) -> None:
    error = error_of(code, "what happened", request_id=bytes(16), retry_after=0.25)
    assert type(error) is CLASSES[code]
    assert error.code == code
    assert (error.message, error.request_id, error.retry_after) == ("what happened", bytes(16), 0.25)


def test_a_code_of_a_later_version_is_still_an_error() -> None:
    error = error_of("of_a_later_version", "what happened")
    assert type(error) is RalmqError
    assert (error.message, error.request_id, error.retry_after) == ("what happened", None, 0.0)


@pytest.mark.parametrize("cls", sorted(FOUND, key=lambda cls: cls.code))
def test_every_class_says_what_it_means_and_whose_fault_it_is(cls: type[RalmqError]) -> None:
    assert cls.__doc__ and "__doc__" in vars(cls), "a docstring of its own"
    assert cls.fault in {"caller", "worker", "broker"}
    assert type(cls.retryable) is bool


def test_whose_fault_and_whether_a_resend_may_help() -> None:
    assert {cls.code: (cls.fault, cls.retryable) for cls in FOUND} == {
        "error": ("broker", False),
        "refused": ("caller", False),
        "malformed": ("caller", False),
        "no_service": ("caller", True),
        "busy": ("broker", True),
        "deadline": ("caller", True),
        "cancelled": ("caller", False),
        "worker_failed": ("worker", False),
        "worker_lost": ("worker", True),
        "poisoned": ("caller", False),
        "no_broker": ("broker", True),
        "closed": ("caller", False),
    }


def test_malformed_is_a_refusal() -> None:
    assert issubclass(errors.Malformed, errors.Refused)


def test_the_text_names_the_request() -> None:
    assert str(errors.Busy("full")) == "full"
    assert str(errors.Busy("full", request_id=b"\xab" * 16)) == f"full [request {'ab' * 16}]"


def test_the_public_module_holds_every_class() -> None:
    for cls in FOUND:
        assert getattr(ralmq.errors, cls.__name__) is cls
