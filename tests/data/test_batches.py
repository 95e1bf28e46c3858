"""Token batches by hand: where each token stands and what predicts what."""

from dataclasses import replace

import pytest
import torch

from prefloop.data.batches import (
    Segment,
    micro_batches,
    pack,
    packed_length,
    rows_of_path,
    to_batches,
)
from prefloop.data.tokenize import Example

TREE = Example(
    prompt=(11, 12, 13),
    answers=((21, 22), (31,)),
    answer_masks=((True, True), (True,)),
    tiers=((1,), (0,)),
)
CHAT = Example(
    prompt=(41,), answers=((51, 52, 53),), answer_masks=((False, True, True),), tiers=((0,),)
)


def test_two_examples_by_hand():
    batch = pack([TREE, CHAT])
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 31, 41, 51, 52, 53]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert batch.segments == (
        Segment(0, 3, -1, 0),
        Segment(3, 2, 0, 3),
        Segment(5, 1, 0, 3),
        Segment(6, 1, -1, 0),
        Segment(7, 3, 3, 1),
    )
    assert batch.target_ids.tolist() == [21, 22, 31, 52, 53]
    assert batch.source_index.tolist() == [2, 3, 2, 7, 8]
    assert batch.target_answer.tolist() == [0, 0, 1, 2, 2]
    assert batch.last_index.tolist() == [4, 5, 9]
    assert batch.answer_example.tolist() == [0, 0, 1]
    assert batch.answer_segment == (1, 2, 4)
    assert batch.paths() == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7, 8, 9]]
    assert (batch.tokens, batch.answers) == (10, 3)


def test_without_a_prompt_the_first_token_has_no_source():
    batch = pack([Example((), ((7, 8, 9),), ((True, True, True),))])
    assert batch.target_ids.tolist() == [8, 9]
    assert batch.source_index.tolist() == [0, 1]
    assert batch.segments == (Segment(0, 3, -1, 0),)


def test_prompts_alone():
    batch = pack([Example((7, 8)), Example((9,))])
    assert (batch.tokens, batch.answers) == (3, 0)
    assert batch.target_ids.shape == (0,)
    assert batch.target_ids.dtype == batch.last_index.dtype == torch.long


def test_values_by_example():
    batch = pack([TREE, CHAT])
    values = batch.by_example(torch.tensor([1.0, 2.0, 3.0]))
    assert values.tolist() == [[1.0, 2.0], [3.0, 0.0]]


def ranking(*tiers):
    count = sum(map(len, tiers))
    answers = tuple((n + 1,) for n in range(count))
    return Example((5,), answers, ((True,),) * count, tiers=tiers)


def test_tiers_and_pairs():
    """Three answers as 2 > {0, 1}, then two as 0 > 1, then two that are tied."""
    batch = pack([ranking((2,), (0, 1)), ranking((0,), (1,)), ranking((0, 1))])
    assert batch.tiers().tolist() == [[1, 1, 0], [0, 1, -1], [0, 0, -1]]
    winners, losers = batch.pairs()
    assert list(zip(winners.tolist(), losers.tolist(), strict=True)) == [(2, 0), (2, 1), (3, 4)]


def test_pairs_of_three_tiers_and_of_none():
    winners, losers = pack([ranking((1,), (3, 0), (2,))]).pairs()
    pairs = [(1, 3), (1, 0), (1, 2), (3, 2), (0, 2)]
    assert list(zip(winners.tolist(), losers.tolist(), strict=True)) == pairs
    winners, losers = pack([ranking((0, 1))]).pairs()
    assert winners.shape == losers.shape == (0,)


def test_margins_stand_by_their_example():
    batch = pack([replace(TREE, margin=0.5), CHAT])
    assert batch.margins().tolist() == [[[0.5]], [[0.0]]]


def test_paths_through_three_levels():
    segments = [Segment(0, 2, -1, 0), Segment(2, 1, 0, 2), Segment(3, 3, 1, 3), Segment(6, 1, 0, 2)]
    assert rows_of_path(segments, 2) == [0, 1, 2, 3, 4, 5]
    assert rows_of_path(segments, 3) == [0, 1, 6]


def test_micro_batches_keep_order_and_budget():
    examples = [Example((1,) * p, ((2,) * a,), ((True,) * a,)) for p, a in [(3, 2), (1, 4), (9, 9)]]
    examples += [examples[0], examples[1], examples[0]]
    assert [packed_length(example) for example in examples] == [5, 5, 18, 5, 5, 5]
    groups = micro_batches(examples, 10)
    assert [[packed_length(e) for e in group] for group in groups] == [[5, 5], [18], [5, 5], [5]]
    assert [example for group in groups for example in group] == examples
    assert micro_batches([], 10) == []


@pytest.mark.parametrize("budget", [1, 6, 10_000])
def test_batches_hold_every_target_once(budget):
    batches = to_batches([TREE, CHAT, TREE], budget, torch.device("cpu"))
    targets = torch.cat([batch.target_ids for batch in batches])
    assert targets.tolist() == [21, 22, 31, 52, 53, 21, 22, 31]


def test_moving_a_batch_moves_every_tensor():
    batch = pack([TREE, CHAT]).to("meta")
    tensors = {
        name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
    }
    assert len(tensors) == 7
    assert all(value.device.type == "meta" for value in tensors.values())
    assert batch.segments == pack([TREE, CHAT]).segments
