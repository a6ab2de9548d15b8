"""What a header says of the pictures that an adapter has to do with."""

import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st

from visionlora.data import learned
from visionlora.data.learned import Learned, history

PICTURES = st.sets(st.integers(0, 300), max_size=60)


def sha(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def in_file(training: dict[str, object]) -> dict[str, object]:
    """A header that went through a file."""
    return dict(json.loads(json.dumps({"training": training})))


@given(PICTURES, PICTURES)
def test_it_comes_back_from_the_header(trained: set[int], chosen: set[int]) -> None:
    own = Learned.of(map(sha, trained), map(sha, chosen - trained))
    assert Learned.in_header(in_file(own.to_header())) == own
    found = own.positions([sha(i) for i in range(301)])
    assert found == (trained, chosen - trained)


@given(PICTURES, PICTURES, PICTURES, PICTURES)
def test_who_learns_on_has_to_do_with_the_pictures_of_both(a: set[int], b: set[int], c: set[int], d: set[int]) -> None:
    first, own = Learned.of(map(sha, a), map(sha, b - a)), Learned.of(map(sha, c), map(sha, d - c))
    entry = history(own, "runs/dog", in_file(first.to_header()))
    assert entry["start_from"] == "dog"
    found = Learned.in_header(in_file(entry))
    assert found is not None
    assert found.positions([sha(i) for i in range(301)]) == (a | c, (b | d) - a - c)


def test_what_is_not_known_is_not_made_up(monkeypatch) -> None:
    own = Learned.of([sha(1), sha(2)])
    assert history(own, None, None) == own.to_header()
    assert history(own, "other.safetensors", {"method": "lora"}) == {"start_from": "other.safetensors"}
    assert Learned.in_header({}) is None
    monkeypatch.setattr(learned, "MOST", 1)
    assert own.to_header() == {}
