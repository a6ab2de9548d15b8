"""Sides that share nothing, with every class at its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.labelled import LabelledData, LabelledItem
from visionlora.data.splits import Splits, of_two_classes, split
from visionlora.errors import ConfigError, DataError

SIDES = ("train", "val", "test")


def data_of(
    labels: Sequence[int | tuple[int, ...]], splits: Sequence[str | None] = (), multi_label: bool = False
) -> LabelledData:
    """A data set of these labels; its classes are called a, b, c ..."""
    tuples = [label if isinstance(label, tuple) else (label,) for label in labels]
    items = tuple(
        LabelledItem(Path(f"/data/{i:04}.png"), label, split)
        for i, (label, split) in enumerate(zip(tuples, splits or [None] * len(tuples), strict=True))
    )
    classes = tuple("abcdefghijklmnop"[: 1 + max(c for label in tuples for c in label)])
    return LabelledData(Path("/data"), classes, items, multi_label, (), "")


def counts(data: LabelledData, splits: Splits) -> dict[str, Counter[int]]:
    return {side: Counter(c for i in getattr(splits, side) for c in data.items[i].labels) for side in SIDES}


def alone(data: LabelledData) -> range:
    return range(len(data.items))


# Who goes where.


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    shares=st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)),
    seed=st.integers(-3, 99),
)
def test_shares_of_single_pictures(labels: list[int], shares: tuple[float, float], seed: int) -> None:
    data = data_of(labels)
    splits = split(data, alone(data), *shares, seed)
    assert sorted(splits.train + splits.val + splits.test) == list(range(len(labels)))
    assert all(list(getattr(splits, side)) == sorted(getattr(splits, side)) for side in SIDES)
    held, share_of = counts(data, splits), dict(zip(SIDES, (1 - sum(shares), *shares), strict=True))
    for c, n in Counter(labels).items():
        assert held["train"][c] >= 1
        for side in SIDES:
            # To within rounding; a class may owe train its only picture.
            assert abs(held[side][c] - n * share_of[side]) < 1
    for side, share in share_of.items():
        if share == 0:
            assert getattr(splits, side) == ()


@given(
    labels=st.lists(st.integers(0, 3), min_size=4, max_size=60),
    groups=st.integers(1, 60),
    trained=st.sets(st.integers(0, 59)),
    chosen=st.sets(st.integers(0, 59)),
    seed=st.integers(0, 9),
)
def test_who_was_learned_from_judges_nothing(
    labels: list[int], groups: int, trained: set[int], chosen: set[int], seed: int
) -> None:
    data, components = data_of(labels), [i % groups for i in range(len(labels))]
    barred = {"val": trained, "test": trained | chosen}
    splits = split(data, components, 0.2, 0.2, seed, barred)
    assert sorted(splits.train + splits.val + splits.test) == list(range(len(labels)))
    side_of = {i: side for side in SIDES for i in getattr(splits, side)}
    for i in range(len(labels)):
        linked = {j for j in range(len(labels)) if components[j] == components[i]}
        assert {side_of[j] for j in linked} == {side_of[i]}
        assert side_of[i] == "train" or not linked & trained
        assert side_of[i] != "test" or not linked & chosen
    assert {labels[i] for i in splits.train} == set(labels)


def test_the_others_judge_in_their_place() -> None:
    data = data_of([0, 1] * 50)
    barred = {"val": range(40), "test": range(50)}
    splits = split(data, alone(data), 0.2, 0.2, 0, barred)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (60, 20, 20)
    assert split(data, alone(data), 0.2, 0.2, 0, {}) == split(data, alone(data), 0.2, 0.2, 0)


def test_roundings_are_carried_from_class_to_class() -> None:
    data = data_of([c % 16 for c in range(16 * 3)])
    splits = split(data, alone(data))  # 0.45 pictures of each class for val, and as many for test
    assert (len(splits.val), len(splits.test)) == (7, 7)


@given(
    items=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25)), min_size=1, max_size=60),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_linked_pictures_stay_together_in_any_order(
    items: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    whole, components = data_of([c for c, _ in items]), [k for _, k in items]
    splits = split(whole, components, seed=seed)
    assert sorted(splits.train + splits.val + splits.test) == list(range(len(items)))
    sides = [{components[i] for i in getattr(splits, side)} for side in SIDES]
    assert sum(map(len, sides)) == len(set(components))
    held = counts(whole, splits)["train"]
    assert set(held) == {c for c, _ in items}

    assert split(whole, components, seed=seed) == splits
    order = data.draw(st.permutations(range(len(items))))
    shuffled = LabelledData(whole.root, whole.classes, tuple(whole.items[i] for i in order), whole.multi_label, (), "")
    # Numbers of components may change with the order too.
    again = split(shuffled, [100 - components[i] for i in order], seed=seed)
    for side in SIDES:
        assert {order[i] for i in getattr(again, side)} == set(getattr(splits, side))


def test_groups_of_equal_size_have_their_shares() -> None:
    data = data_of([0] * 100 + [1] * 100)
    splits = split(data, [i // 5 for i in range(200)], 0.2, 0.1)
    assert {side: dict(c) for side, c in counts(data, splits).items()} == {
        "train": {0: 70, 1: 70},
        "val": {0: 20, 1: 20},
        "test": {0: 10, 1: 10},
    }


def test_large_groups_may_be_in_any_side() -> None:
    components = [i // 10 for i in range(50)] + list(range(5, 55))
    data = data_of([0] * 100)
    seen = dict.fromkeys(SIDES, 0)
    for seed in range(40):
        splits = split(data, components, 0.3, 0.3, seed)
        for side in SIDES:
            seen[side] += sum(i < 50 for i in getattr(splits, side))
    assert all(0.2 < seen[side] / (40 * 50) < 0.5 for side in SIDES)


def test_seeds_draw_differently_and_evenly() -> None:
    data = data_of([0, 1] * 20)
    draws = [split(data, alone(data), seed=seed).val for seed in range(60)]
    assert len(set(draws)) > 50
    often = Counter(i for draw in draws for i in draw)
    assert min(often[i] for i in range(40)) >= 2
    assert max(often.values()) <= 20


def test_several_labels() -> None:
    rng = np.random.default_rng(0)
    labels = [tuple(np.flatnonzero(rng.random(4) < (0.5, 0.3, 0.1, 0.02)).tolist()) for _ in range(400)]
    data = data_of(labels, multi_label=True)
    splits = split(data, alone(data))
    totals, held = Counter(c for label in labels for c in label), counts(data, splits)
    for c, n in totals.items():
        assert held["train"][c] >= 1
        assert abs(held["val"][c] - 0.15 * n) <= 4
        assert abs(held["test"][c] - 0.15 * n) <= 4
    assert [len(splits.val), len(splits.test)] == pytest.approx([60, 60], abs=4)


def test_small_classes_are_noted() -> None:
    data = data_of([0] * 20 + [1] * 2 + [2])
    splits = split(data, alone(data))
    assert splits.notes == ("val has no picture of 2 classes: b, c", "test has no picture of 2 classes: b, c")
    data = data_of([0, 1])
    assert split(data, alone(data), test_share=0).notes == (
        "val is empty: there are too few pictures that can be taken from train",
    )


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    data = data_of([0, 1])
    with pytest.raises(ConfigError) as caught:
        split(data, alone(data), val_share=share)
    assert str(caught.value) == f"val_share is {share:g}; it must be at least 0 and below 1, e.g. 0.15."


def test_shares_that_leave_nothing() -> None:
    data = data_of([0, 1])
    with pytest.raises(ConfigError) as caught:
        split(data, alone(data), 0.5, 0.5)
    assert str(caught.value) == (
        "val_share and test_share are 0.5 and 0.5, which leaves nothing to train on; together they must be below 1."
    )


def test_look_alikes_of_two_classes_are_named() -> None:
    data = data_of([0, 0, 1, 1, 2, 0, 1])
    assert of_two_classes(data, [0, 1, 0, 2, 2, 1, 6]) == [
        "2 pictures look like one of another class, so that one of the labels may be wrong: 0000.png (a) and 0002.png (b), "
        "0003.png (b) and 0004.png (c)"
    ]
    assert of_two_classes(data, alone(data)) == []
    assert of_two_classes(data_of([(0,), (1,)], multi_label=True), [0, 0]) == []


# Splits of the data's own.


def test_named_splits_are_kept() -> None:
    data = data_of([0, 1] * 5, ["train"] * 6 + ["val"] * 2 + ["test"] * 2)
    splits = split(data, alone(data), 0, 0)
    assert (splits.train, splits.val, splits.test) == (tuple(range(6)), (6, 7), (8, 9))
    assert splits.notes == ("the data names its splits train, val, test; they are kept",)


@given(seed=st.integers(0, 20))
def test_a_missing_side_is_cut_from_train(seed: int) -> None:
    data = data_of([0, 1] * 20, ["train"] * 30 + ["test"] * 10)
    splits = split(data, alone(data), 0.2, seed=seed)
    assert splits.test == tuple(range(30, 40))
    assert counts(data, splits)["val"] == {0: 3, 1: 3}
    assert splits.notes == ("the data names its splits train, test; they are kept, and val cut from train",)
    data = data_of([0, 1] * 20, ["train"] * 40)
    assert [len(getattr(split(data, alone(data), 0.2, 0.1), side)) for side in SIDES] == [28, 8, 4]
    assert split(data, alone(data), 0.2, 0).test == ()


def test_duplicates_across_named_splits_stay_and_are_noted() -> None:
    data = data_of([0] * 20, ["train"] * 8 + ["val"] * 6 + ["test"] * 6)
    splits = split(data, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 90, 0, 91, 92, 93, 94, 95])
    assert (splits.train, splits.val, splits.test) == (tuple(range(8)), tuple(range(8, 14)), tuple(range(14, 20)))
    assert splits.notes[1] == (
        "6 pictures are linked with one of another split (near duplicates, or the same group), so that scores may be too "
        "good: 0000.png (train) and 0008.png (val), 0000.png (train) and 0014.png (test), 0001.png (train) and 0009.png "
        "(val), 0002.png (train) and 0010.png (val), 0003.png (train) and 0011.png (val) and 1 more"
    )


def test_named_splits_that_were_learned_from_stay_and_are_noted() -> None:
    data = data_of([0, 0, 0, 0], ["train", "val", "test", "test"])
    splits = split(data, alone(data), barred={"val": {0}, "test": {0, 2, 3}})
    assert splits.test == (2, 3) and splits.val == (1,)
    assert "2 pictures of test had a part in an earlier training, so that scores may be too good" in splits.notes
    assert not any("of val" in note for note in splits.notes)


def test_a_class_that_is_not_in_train() -> None:
    data = data_of([0, 1, 2, 2, 2], ["train", "train", "val", "test", "test"])
    with pytest.raises(DataError) as caught:
        split(data, alone(data))
    assert str(caught.value) == (
        "/data has 1 problem:\n"
        "  class c is not in train (1 in val and 2 in test); move some of its pictures there\n"
        "Fix this first: what is not in train cannot be learned."
    )


def test_splits_are_named_for_all_or_none() -> None:
    data = data_of([0, 1], ["train", None])
    with pytest.raises(ValueError, match="either all items name a split, or none"):
        split(data, alone(data))
