"""Who shares a forward pass, and how often each comes up."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.groups import grouped
from visionlora.training.order import positions_at

PICTURES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=9)


@given(PICTURES, st.integers(1, 4), st.integers(0, 5))
def test_every_picture_comes_up_as_often_as_it_repeats_and_never_beside_another_size(
    pictures: list[tuple[str, int]], turn: int, seed: int
) -> None:
    keys, repeats = zip(*pictures, strict=True)
    groups = grouped(keys, repeats, [0] * len(keys))
    cycle = sum(repeats)  # turns until every group has had its own
    seen = torch.cat([positions_at(seed, n * turn, turn, turn, groups) for n in range(cycle)]).view(cycle, turn)
    assert all(len({keys[i] for i in row}) == 1 for row in seen.tolist())
    assert Counter(seen.flatten().tolist()) == {i: turn * count for i, count in enumerate(repeats)}


@given(PICTURES, st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
def test_subject_and_class_get_equally_many_turns(pictures: list[tuple[str, int]], others: list[str]) -> None:
    keys, repeats = zip(*pictures, strict=True)
    groups = grouped([*keys, *others], [*repeats, *(1 for _ in others)], [0] * len(keys) + [1] * len(others))
    own = [g for g in groups if g.positions[0] < len(keys)]
    turns = sum(g.turns for g in own), sum(g.turns for g in groups) - sum(g.turns for g in own)
    assert turns[0] == turns[1] == max(sum(repeats), len(others))
    assert all(g.turns >= 1 for g in groups)


@given(PICTURES, st.integers(0, 30))
def test_a_step_does_not_depend_on_how_many_processes_share_it(pictures: list[tuple[str, int]], step: int) -> None:
    keys, repeats = zip(*pictures, strict=True)
    groups = grouped(keys, repeats, [0] * len(keys))
    whole = positions_at(0, step * 8, 8, 4, groups)
    assert torch.equal(whole, torch.cat([positions_at(0, step * 8 + i, 4, 4, groups) for i in (0, 4)]))
