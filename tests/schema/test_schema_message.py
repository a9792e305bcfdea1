"""The vocabulary: codes that never change, frozen records, and what each field accepts."""

from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest
from ralmq.schema import checks, errors, message
from ralmq.schema.codec import decode, encode, plan
from ralmq.schema.errors import Malformed
from ralmq.schema.limits import MAX_ACTIVE, MAX_ROWS, MAX_SERVICES
from ralmq.schema.message import CODES, KINDS, Active, Beat, Hello, Kind, Message, Row, Span, Start, Step
from schema_samples import ID, SAMPLES


def test_the_codes_on_the_wire() -> None:
    assert {cls.__name__.upper(): code for code, cls in KINDS.items()} == {
        "HELLO": 1,
        "WELCOME": 2,
        "BEAT": 3,
        "BYE": 4,
        "GONE": 5,
        "REQUEST": 16,
        "PARTIAL": 17,
        "FINAL": 18,
        "ERROR": 19,
        "CANCEL": 20,
        "CREDIT": 21,
        "FORM": 32,
        "STEP": 33,
        "RELEASE": 34,
    }
    assert {name: code for name, code in vars(Kind).items() if name.isupper()} == {
        cls.__name__.upper(): code for code, cls in KINDS.items()
    }
    assert {cls: code for code, cls in KINDS.items()} == CODES
    assert set(get_args(Message)) == set(CODES)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_message_is_frozen_slotted_and_explained(sample: Any) -> None:
    assert not hasattr(sample, "__dict__")
    assert type(sample).__doc__
    for entry in fields(sample):
        with pytest.raises(FrozenInstanceError):
            setattr(sample, entry.name, None)


@pytest.mark.parametrize("cls", KINDS.values(), ids=lambda cls: cls.__name__)
def test_every_field_but_the_tensors_has_a_place_on_the_wire(cls: type[Any]) -> None:
    routing, body, has_tensors = plan(cls)
    names = [name for name, _, _ in (*routing, *body)] + ["tensors"] * has_tensors
    assert sorted(names) == sorted(entry.name for entry in fields(cls))
    needed = [required for _, _, required in routing]
    assert needed == sorted(needed, reverse=True), "required entries first: a shorter array leaves out the others"


SPAN = Span("m", "f", 0, 1, 2, 0, 0, 0)
ROW = Row(ID, 0, 0, 0, ())


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        (Hello(ID[:15], "a"), "nonce"),
        (Hello("0" * 16, "a"), "nonce"),  # type: ignore[arg-type]
        (Hello(ID, ""), "name"),
        (Hello(ID, b"a"), "name"),  # type: ignore[arg-type]
        (Hello(ID, "a", features=-1), "features"),
        (Hello(ID, "a", features=2**31), "features"),
        (Hello(ID, "a", services=("s",) * (MAX_SERVICES + 1)), "services"),
        (Hello(ID, "a", services="echo"), "services"),  # type: ignore[arg-type]
        (Hello(ID, "a", services=("",)), "services"),
        (Hello(ID, "a", idempotent=1), "idempotent"),  # type: ignore[arg-type]
        (Hello(ID, "a", labels={1: 2}), "labels"),  # type: ignore[dict-item]
        (Hello(ID, "a", span=SPAN._replace(first=1)), "span"),
        (Hello(ID, "a", span=SPAN._replace(last=3)), "span"),
        (Hello(ID, "a", span=SPAN._replace(first=-1)), "span"),
        (Hello(ID, "a", span=SPAN[:7]), "span"),  # type: ignore[arg-type]
        (Hello(ID, "a", span="span"), "span"),  # type: ignore[arg-type]
        (message.Welcome(beat_ms=0), "beat_ms"),
        (Beat(progress=2**63), "progress"),
        (Beat(active=(Active(ID, 0),) * (MAX_ACTIVE + 1)), "active"),
        (Beat(active=(Active(ID, 65_536),)), "active"),
        (message.Gone(1), "reason"),  # type: ignore[arg-type]
        (message.Request("a", priority=True), "priority"),
        (message.Request("a", parent=b""), "parent"),
        (message.Error(""), "code"),
        (message.Form("m", 0, 0, 1, 1), "stages"),
        (Step(rows=(ROW,) * (MAX_ROWS + 1)), "rows"),
        (Step(rows=(ROW._replace(blocks=(1, -1)),)), "rows"),
        (Step(rows=(ROW._replace(blocks=(1, True)),)), "rows"),
        (Step(rows=(ROW._replace(blocks=(2**31,)),)), "rows"),
        (Step(rows=(ROW._replace(blocks=(0,) * (MAX_ROWS + 1)),)), "rows"),
        (Step(rows=(ROW._replace(blocks="12"),)), "rows"),  # type: ignore[arg-type]
        (Step(starts=(Start(0, 0, []),)), "starts"),  # type: ignore[arg-type]
        (Step(returns=(message.Return(ID, 0, -2, False),)), "returns"),
        (Step(returns=(message.Return(ID, 0, 0, 0),)), "returns"),  # type: ignore[arg-type]
    ],
)
def test_a_field_out_of_range_is_refused_by_name(sample: Any, field: str) -> None:
    with pytest.raises(Malformed, match=f"^{field}: "):
        encode(sample)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.text(3, 1), ["a", "abc", "żół"], ["", "abcd", b"a", 1, None]),
        (checks.integer(-1, 5), [-1, 0, 5], [-2, 6, 1.0, True, None, "1"]),
        (checks.flag, [True, False], [0, 1, None, "yes"]),
        (checks.identifier, [bytes(16)], [bytes(15), bytes(17), "0" * 16, bytearray(16), None]),
        (checks.maybe(checks.flag), [None, True], [0, "x"]),
        (checks.mapping, [{}, {"a": [1]}], [{1: 2}, {"a": 1, b"b": 2}, [], None]),
        (
            checks.facts,
            [{}, {"a": "b", "c": None, "d": True, "e": 0.5}],
            [{1: 2}, {"a": 1, "b": [1]}, {"a": {}}, [], None],
        ),
        (checks.facts, [{"a": 1}], [{"a": b"x"}, {"a": bytearray(1)}, {"a": ()}]),
    ],
)
def test_a_check_returns_what_it_accepts(check: checks.Check, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check(value) is value
    for value in bad:
        with pytest.raises(Malformed, match=r"^expected "):
            check(value)


@pytest.mark.parametrize("check", [checks.list_of(checks.integer(0, 9), 3), checks.integers(0, 9, 3)])
def test_a_list_becomes_a_tuple(check: checks.Check) -> None:
    for value in ([], [0], (1, 9), [1, 2, 3]):
        assert check(value) == tuple(value) and type(check(value)) is tuple
    for bad in ([1, 2, 3, 4], [10], [-1], [1.0], ["1"], [None], {}, {1}, "12", b"12", None, 3):
        with pytest.raises(Malformed, match=r"^expected "):
            check(bad)


@pytest.mark.parametrize("code", [*errors.CLASSES, "of_a_later_version"])
def test_an_error_message_becomes_the_error_it_names(code: str) -> None:
    got = decode(encode(message.Error(code, "what happened", 250), id=ID))
    error = errors.error_of(got[1].code, got[1].message, request_id=got[0].id, retry_after=got[1].retry_after_ms / 1000)
    assert type(error) is errors.CLASSES.get(code, errors.RalmqError)
    assert (error.message, error.request_id, error.retry_after) == ("what happened", ID, 0.25)


def test_a_note_is_cut_between_characters() -> None:
    check = checks.note(7)
    assert check("seven 7") == "seven 7"
    assert check("eight 88") == "eight 8"
    assert check("żółwie") == "żółw"
    assert check("€€€") == "€€"
    assert check("\ud800x") == "?x"
    with pytest.raises(Malformed, match=r"^expected text"):
        check(b"bytes")


def test_what_was_wrong_is_shown_briefly() -> None:
    for value in ("x" * 10_000, b"x" * 10_000, [0] * 10_000, {str(n): n for n in range(10_000)}, 10**1000):
        with pytest.raises(Malformed) as caught:
            checks.flag(value)
        assert len(caught.value.message) < 100
