import random

from prefloop.recipes.splits import distinct, near_duplicates, split

WORDS = [f"word{number}" for number in range(400)]


def sentence(draw: random.Random, length: int = 30) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


def test_near_duplicates_and_theirs_are_one_group() -> None:
    """b shares 20 of 28 shingles with a, c 20 of 28 with b, and a and c 16 of 32."""
    draw = random.Random(0)
    texts = [sentence(draw) for _ in range(300)]
    words = [f"w{number}" for number in range(38)]
    a, b, c = (" ".join(words[start : start + 26]) for start in (0, 4, 8))
    found = near_duplicates([a, *texts, b, c, a.upper() + "!"])
    assert found[0] == found[301] == found[302] == found[303] == 0
    assert found[1:301] == list(range(1, 301))


def test_what_shares_less_stays_apart() -> None:
    words = [f"w{number}" for number in range(60)]
    a, b = " ".join(words[:30]), " ".join(words[15:45])  # 13 of 43 shingles
    assert near_duplicates([a, b]) == [0, 1]


def test_short_texts_have_one_shingle() -> None:
    assert near_duplicates(["Hi", "hi!", "", "so"]) == [0, 0, 2, 3]


def test_distinct_keeps_one_of_each_group() -> None:
    texts = ["one two three four"] * 3 + ["five six seven eight", "nine ten"]
    places = distinct(texts, seed=1)
    assert sorted(places) == [0, 3, 4]
    assert distinct(texts, seed=1) == places
    assert len({tuple(distinct(texts, seed=seed)) for seed in range(9)}) > 1


def test_split_keeps_groups_whole_and_the_shares() -> None:
    groups = [place - place % 3 for place in range(300)] + [300] * 50
    parts = split(groups, {"a": 0.5, "b": 0.3, "c": 0.2}, seed=0, fixed={300: "c"})
    of = {place: name for name, places in parts.items() for place in places}
    assert sorted(of) == list(range(350))
    assert all(of[place] == of[group] for place, group in enumerate(groups))
    sizes = {name: sum(place < 300 for place in places) for name, places in parts.items()}
    assert sizes == {"a": 150, "b": 90, "c": 60}
    assert {of[place] for place in range(300, 350)} == {"c"}
