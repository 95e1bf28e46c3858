import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from prefloop.data import formats
from prefloop.errors import UserError
from prefloop.files import write_jsonl
from prefloop.recipes import sentiment_data as data
from prefloop.recipes.fetch import MOVIE_RATINGS, RatedSentence, fetch_movie_ratings
from prefloop.records import RowCounts

GOOD, BAD = ("fine", "moving", "funny", "rich"), ("dull", "weak", "empty", "stale")


def toy_sentences(count: int = 400) -> list[RatedSentence]:
    """Sentences whose raters like the words of GOOD and dislike those of BAD."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        good = rng.random() < 0.5
        words = rng.choice(GOOD if good else BAD, 3)
        text = f"Opening{number} of film number{number % 7} is {words[0]}, {words[1]}, {words[2]}."
        centre = 2.0 if good else -2.0
        ratings = np.clip(np.rint(centre + rng.normal(0, 1, 20)), -4, 4).astype(int)
        rows.append(RatedSentence(text, tuple(ratings.tolist())))
    return rows


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ("a ''quoted'' word", 'A "quoted" word.'),
        ("It 's  odd , is n't it ?", "It's - odd, isn't it?"),
        ("Lovely &amp; Amazing", "Lovely & Amazing."),
        ("...a good film.", "A good film."),
        ("the screen...Tuck is ... fine!", "The screen... Tuck is... fine!"),
        ("She said `yes.'\"", "She said 'yes.'\""),
    ],
)
def test_clean(raw: str, tidy: str) -> None:
    assert data.clean(raw) == tidy


def test_prompt_and_completion_are_the_sentence() -> None:
    def of(words: int) -> RatedSentence:
        return RatedSentence(" ".join(["word"] * words) + ".", (0,))

    fitting = of(data.SHORTEST)
    (row,) = data.demonstrations([fitting, of(data.SHORTEST - 1), of(data.LONGEST + 1)])
    assert row["prompt"] + row["completion"] == fitting.text
    assert row["completion"].startswith(" ")
    assert len(row["prompt"].split()) in (4, 5)
    assert data.prompts([fitting, of(data.SHORTEST - 1)]) == [row["prompt"]]


def test_splits_share_no_opening() -> None:
    sentences = toy_sentences() + [
        RatedSentence(f"The same four words and then {i}.", (1,)) for i in range(9)
    ]
    sizes = {"gold": 200, "sft": 80, "preference": 60, "ppo": 40, "evaluation": 20}
    parts = data.split(sentences, sizes)
    assert sum(map(len, parts.values())) == len(sentences)
    openings = [{data.opening(s.text, 4).lower() for s in part} for part in parts.values()]
    assert len(set.union(*openings)) == sum(map(len, openings))
    assert list(parts) == list(sizes)
    assert sizes["gold"] <= len(parts["gold"]) < sizes["gold"] + 9


def test_gold_scores_as_the_fitted_regression() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    train, held_out = toy_sentences()[:300], toy_sentences()[300:]
    fitted = data.fit_gold(train, held_out)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    features = vectorizer.fit_transform([s.text for s in train]).toarray()
    means = np.array([s.mean for s in train])
    centred = features - features.mean(0)  # ridge in closed form, the intercept not penalised
    gram = centred.T @ centred + data.RIDGE * np.eye(centred.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (means - means.mean()))
    texts = [s.text for s in held_out] + ["", "words never seen", "Fine fine fine, dull film!"]
    tested = vectorizer.transform(texts).toarray()
    expected = means.mean() + (tested - features.mean(0)) @ weights
    np.testing.assert_allclose([fitted.score(t) for t in texts], expected, atol=1e-4)
    assert fitted.held_out_r > 0.9
    assert fitted.held_out_sentences == 100


def test_pair_agreement() -> None:
    a = np.array([1.0, 2.0, 3.0])
    assert data.pair_agreement(a, 10 * a) == 1.0
    assert data.pair_agreement(a, -a) == 0.0
    # Pairs (1,2), (1,3), (2,3): alike, alike, a tie on one side only.
    assert data.pair_agreement(a, np.array([1.0, 2.0, 2.0])) == pytest.approx(5 / 6, abs=0.01)


def test_noise_of_raters_worked_by_hand() -> None:
    noise = data.measure_noise([RatedSentence("a", (1, 3)), RatedSentence("b", (-2, -2))])
    assert sorted(noise.residuals.tolist()) == [-1.0, 0.0, 0.0, 1.0]
    assert noise.deviation == pytest.approx(0.5**0.5)
    assert noise.half_pair_agreement == 1.0


def test_annotators_without_noise_rank_by_rounded_gold() -> None:
    rng = np.random.default_rng(0)
    tiers = data.annotate([0.2, 3.6, -0.4, -9.0], np.zeros(3), 3, rng)
    assert tiers == ((1,), (0, 2), (3,))  # 4 | 0, 0 | -4


def test_more_annotators_come_nearer_to_the_gold() -> None:
    residuals = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    rng = np.random.default_rng(0)

    def right(annotators: int) -> float:
        seen = [data.annotate([1.0, 0.0], residuals, annotators, rng) for _ in range(400)]
        return float(np.mean([tiers == ((0,), (1,)) for tiers in seen]))

    assert 0.5 < right(1) < right(3) < right(25)
    assert right(25) > 0.95


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that holds a gold reward fitted on toy sentences."""
    fitted = data.fit_gold(toy_sentences(), toy_sentences(50))
    name = f"gold-{data.GOLD_VERSION}-{MOVIE_RATINGS.sha256[:8]}.json"
    write_jsonl(tmp_path / "sentiment" / name, [asdict(fitted)])
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))
    data.gold.cache_clear()
    yield tmp_path
    data.gold.cache_clear()


def test_gold_reward_reads_prompt_and_completion(cached: Path) -> None:
    good, bad = data.gold_reward(["The film is"] * 2, [" fine, moving, rich.", " dull, weak."])
    assert good > 1 > -1 > bad


def test_rankings_are_records_that_training_reads(cached: Path, tmp_path: Path) -> None:
    samples, output = tmp_path / "samples.jsonl", tmp_path / "rankings.jsonl"
    answers = [" fine, rich.", " dull, weak.", " fine, rich.", " fine, dull."]
    rows = [
        {"prompt": "The film is", "completions": answers},
        {"prompt": "P", "completions": ["a"] * 4},
    ]
    write_jsonl(samples, rows)
    noise = data.measure_noise(toy_sentences())
    facts = data.rank_samples(samples, output, 5, 0, noise)
    assert facts == json.loads((tmp_path / "rankings.json").read_text())
    assert (facts["rankings"], facts["prompts_with_one_distinct_answer"]) == (1, 1)
    (ranking,) = formats.load(str(output), "preference", RowCounts())
    assert ranking.completions == (" fine, rich.", " dull, weak.", " fine, dull.")
    assert ranking.tiers[0] == (0,)
    assert facts["strict_pairs"] + facts["tied_pairs"] == 3
    before = output.read_bytes()
    data.rank_samples(samples, output, 5, 0, noise)
    assert output.read_bytes() == before
    with pytest.raises(UserError, match="at least 1"):
        data.rank_samples(samples, output, 0, 0, noise)


def test_rankings_keep_the_tokens_and_finish_reasons_of_their_answers(
    cached: Path, tmp_path: Path
) -> None:
    samples, output = tmp_path / "samples.jsonl", tmp_path / "rankings.jsonl"
    row = {
        "prompt": "The film is",
        "completions": [" fine, rich.", " dull, weak.", " fine, rich.", " fine, dull."],
        "completion_ids": [[7, 2], [8], [9, 2], [6, 6]],
        "finish_reasons": ["stop", "length", "stop", None],
        "tokenizer": "0123456789abcdef",
    }
    write_jsonl(samples, [row])
    data.rank_samples(samples, output, 5, 0, data.measure_noise(toy_sentences()))
    (told,) = [json.loads(line) for line in output.read_text().splitlines()]
    # The third answer says what the first one says: it is left out with its tokens.
    assert told["completions"] == [" fine, rich.", " dull, weak.", " fine, dull."]
    assert told["completion_ids"] == [[7, 2], [8], [6, 6]]
    assert told["finish_reasons"] == ["stop", "length", None]
    assert told["tokenizer"] == row["tokenizer"]
    (ranking,) = formats.load(str(output), "preference", RowCounts())
    assert [(one.ids, one.ended) for one in ranking.sampled] == [
        *(((7, 2), True), ((8,), False), ((6, 6), None)),
    ]


@pytest.mark.slow
def test_the_real_data_are_as_documented() -> None:
    sentences = fetch_movie_ratings()
    assert len(sentences) == 10_605
    assert sum(len(s.ratings) for s in sentences) == 198_810
    noise = data.measure_noise(sentences)
    assert noise.half_pair_agreement == pytest.approx(0.908, abs=0.005)
    fitted = data.gold()
    assert fitted.held_out_r > 0.65
    assert fitted.held_out_pair_accuracy > 0.72
