import pytest

from prefloop.recipes import scores

WHY = "comes with the extra `recipes`"


def test_overlap_worked_by_hand() -> None:
    """Words: 3 and 4, of which 2 are shared, 4/7; pairs: 2 and 3, 1 shared, 2/5."""
    (found,) = scores.overlap([""], ["Red fox, red!"], ["the red fox ran"])
    assert found == pytest.approx((4 / 7 + 2 / 5) / 2)
    assert scores.overlap(["", ""], ["", "fox"], ["fox", "Fox"]) == [0.0, 0.5]


def test_chrf() -> None:
    """ "ab" and "ac": of 1-grams of characters one of two is shared, nothing else; six orders of
    characters and two of words, those that neither side has left out: 0.5, 0 (2-grams), 0 (words).
    """
    pytest.importorskip("sacrebleu", reason=WHY)
    same, other, half = scores.chrf([""] * 3, ["ein Haus", "xyz", "ab"], ["ein Haus", "abc", "ac"])
    assert same == 1.0 and other == 0.0
    assert half == pytest.approx(0.5 / 3, abs=1e-4)
    assert scores.content([""], ["ab"], ["ac"]) == [half]


def test_rouge_l_worked_by_hand() -> None:
    """The longest common subsequence is "das Haus ist grün": 4 of 5 and of 6 words."""
    pytest.importorskip("rouge_score", reason=WHY)
    mine, theirs = "das Haus ist grün heute", "Das kleine Haus ist sehr grün"
    assert scores.rouge_l([""], [mine], [theirs]) == [pytest.approx(2 * 4 / 11)]
    assert scores.rouge_l([""], ["grun"], ["grün"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "declines"),
    [
        ("I’m really sorry, I can't do that.", True),
        ("I cannot help with this.", True),
        ("As an AI language model, I have no taste.", True),
        ("That's not something I would do.", True),
        ("You can't go wrong with two eggs.", False),
        ("Sure! First, boil the water.", False),
        ("Here it is. " * 30 + "I'm sorry if it is long.", False),
    ],
)
def test_refuses(text: str, declines: bool) -> None:
    assert scores.refuses([""], [text]) == [float(declines)]
