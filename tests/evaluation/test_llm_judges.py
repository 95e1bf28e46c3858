"""LLM judges against a server on this machine that replies as each test says."""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefloop.config import RankConfig, WinrateConfig
from prefloop.config.checks import validate
from prefloop.config.endpoint import EndpointConfig
from prefloop.errors import UserError
from prefloop.evaluation import rank, winrate
from prefloop.files import write_jsonl
from prefloop.records import Message
from prefloop.rewards.llm import Answer, Pair, Preference, pairwise_judge, rubric_judge
from tests.evaluation.llm_server import Reply, Server, section, serving


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFLOOP_JUDGE_API_KEY", raising=False)


def settings(tmp_path: Path, **options: Any) -> EndpointConfig:
    return EndpointConfig(judge_cache=tmp_path / "cache", **options)


def quick(judge: Any) -> Any:
    """The same judge, waiting a thousandth as long between tries."""
    return replace(judge, endpoint=replace(judge.endpoint, backoff=0.001))


def pairwise(server: Server, tmp_path: Path, **options: Any) -> Any:
    return quick(pairwise_judge(server.judge, settings(tmp_path, **options)))


def rubric(server: Server, tmp_path: Path, **options: Any) -> Any:
    return quick(rubric_judge(server.judge, settings(tmp_path, **options)))


def longer(prompt: str, before: int) -> Reply:
    """Prefers the longer answer, wherever it stands."""
    a, b = (len(section(prompt, name)) for name in ("answer_a", "answer_b"))
    return f"I weigh [[B]]... and say [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def by_length(prompt: str, before: int) -> Reply:
    return f"So: [[{min(10, len(section(prompt, 'answer')))}]]"


PAIRS = [
    Pair("p", Answer("long"), Answer("a")),
    Pair("p", Answer("a"), Answer("long")),
    Pair("q", Answer("ab"), Answer("cd")),
    Pair("q", Answer("same"), Answer("same")),
]


# --- verdicts ------------------------------------------------------------------------------------


def test_both_orders_are_asked_and_the_last_verdict_counts(tmp_path: Path) -> None:
    with serving(longer) as server:
        judge = pairwise(server, tmp_path)
        said = judge.prefer(PAIRS)
    assert said == [
        Preference(1.0, True),
        Preference(0.0, True),
        Preference(0.5, True),
        Preference(0.5, True),
    ]
    # Two pairs are each other's turn and two requests; equal answers are not asked about.
    assert len(server.asked) == 4
    assert server.asked[0]["temperature"] == 0
    assert server.asked[0]["model"] == "tiny/judge"
    usage = judge.endpoint.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (4, 400, 28)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_goes_by_the_place_sees_ties(letter: str, tmp_path: Path) -> None:
    with serving(lambda *_: f"[[{letter}]]") as server:
        said = pairwise(server, tmp_path).prefer(PAIRS[:1])
    assert said == [Preference(0.5, False)]


def test_a_win_in_one_order_and_a_tie_in_the_other_disagree(tmp_path: Path) -> None:
    def once(prompt: str, before: int) -> Reply:
        return "[[A]]" if section(prompt, "answer_a") == "long" else "[[C]]"

    with serving(once) as server:
        assert pairwise(server, tmp_path).prefer(PAIRS[:1]) == [Preference(0.5, False)]


def test_rubric_scores_chats_and_cut_answers(tmp_path: Path) -> None:
    chat = (Message("system", "Be brief."), Message("user", "Hi {answer}"))
    with serving(by_length) as server:
        judge = rubric(server, tmp_path, judge_concurrency=1)
        assert judge([chat, "p"], ["four", "{prompt}"], [True, True]) == [4.0, 8.0]
        judge(["p"], ["four"], [False])
    assert section(server.prompts[0], "prompt") == "system: Be brief.\n\nuser: Hi {answer}"
    assert section(server.prompts[-1], "answer").startswith("four\n[The answer was cut here")


@pytest.mark.parametrize("bad", ["none", "[[11]]", "[[0]]", "[[A]]", ""])
def test_a_reply_without_a_verdict_is_asked_once_more(bad: str, tmp_path: Path) -> None:
    with serving(lambda prompt, before: bad if before == 0 else "[[7]]") as server:
        judge = rubric(server, tmp_path)
        assert judge.rate(["p"], ["a"], [True]) == [7.0]
    first, second = (body["messages"] for body in server.asked)
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[:2] == [*first, {"role": "assistant", "content": bad}]
    assert "from [[1]] to [[10]]" in second[2]["content"]


def test_what_gets_no_verdict_is_none_and_counted_never_a_tie(tmp_path: Path) -> None:
    def one_fails(prompt: str, before: int) -> Reply:
        if section(prompt, "prompt") == "rude":
            return 400 if section(prompt, "answer_a") == "long" else "I will not say."
        return longer(prompt, before)

    pairs = [*PAIRS[:1], Pair("rude", Answer("long"), Answer("a"))]
    with serving(one_fails) as server:
        judge = pairwise(server, tmp_path)
        assert judge.prefer(pairs) == [Preference(1.0, True), None]
    assert judge.endpoint.usage.failed == 2
    with (
        serving(lambda *_: "I will not say.") as server,
        pytest.raises(UserError, match="no verdict at all; a reply holds no verdict: 'I will not"),
    ):
        pairwise(server, tmp_path).prefer(pairs)


def test_a_judge_that_must_score_all_says_which_it_could_not(tmp_path: Path) -> None:
    with serving(lambda p, _: 413 if section(p, "answer") == "b" else "[[3]]") as server:
        judge = rubric(server, tmp_path)
        with pytest.raises(UserError, match=r"1 of 2 answers got no score \(status 413 \(no\)\)"):
            judge(["p", "p"], ["a", "b"])


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        429,
        500,
        503,
        (429, {"Retry-After": "0"}, "slow down"),
        b"<html>busy</html>",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 3}}]}',
        b"",
        30.0,
    ],
    ids=str,
)
def test_faults_that_pass(fault: Reply, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda prompt, before: fault if before < 2 else "[[4]]") as server:
        if isinstance(fault, float):  # a reply later than the client's patience
            fault = 0.4
            judge = rubric(server, tmp_path, judge_timeout=0.1)
        else:
            judge = rubric(server, tmp_path)
        assert judge(["p", "p"], ["a", "b"]) == [4.0, 4.0]
    retries = judge.endpoint.usage.retries
    assert retries == 4 or (isinstance(fault, float) and retries > 4)  # on a slow machine
    assert judge.endpoint.usage.failed == 0
    told = capsys.readouterr().err
    assert told.count("tried again") == 1


def test_the_endpoint_says_how_long_to_wait(tmp_path: Path) -> None:
    fault: Reply = (429, {"Retry-After": "1"}, "")
    began = time.monotonic()
    with serving(lambda prompt, before: fault if before == 0 else "[[4]]") as server:
        rubric(server, tmp_path)(["p"], ["a"])
    assert time.monotonic() - began >= 1.0


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    with serving(by_length) as server:
        judge = rubric(server, tmp_path)
        judge(["p"], ["abc"])
    port = int(server.url.rsplit(":", 1)[1].removesuffix("/v1"))
    judge = replace(judge, endpoint=replace(judge.endpoint, backoff=0.05))
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(judge(["p", "p"], ["abc", "abcd"])))
    thread.start()
    time.sleep(0.2)
    assert judge.endpoint.usage.retries > 0
    with serving(by_length, port=port):
        thread.join()
    assert found == [[3.0, 4.0]]


def test_a_server_that_stays_away_ends_the_command_which_then_goes_on(tmp_path: Path) -> None:
    def dies(prompt: str, before: int) -> Reply:
        return "[[2]]" if section(prompt, "answer") == "a" else 500

    with serving(dies) as server:
        judge = rubric(server, tmp_path, judge_concurrency=1)
        with pytest.raises(UserError, match=r"status 500 \(no\), 8 times; see whether it runs"):
            judge(["p", "p", "p"], ["a", "b", "c"])
    assert len(server.asked) == 9
    port = int(server.url.rsplit(":", 1)[1].removesuffix("/v1"))
    with serving(by_length, port=port) as again:
        judge = rubric(again, tmp_path)
        assert judge(["p", "p", "p"], ["a", "b", "c"]) == [2.0, 1.0, 1.0]
    assert [section(p, "answer") for p in again.prompts] in (["b", "c"], ["c", "b"])
    assert judge.endpoint.usage.cached == 1


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    judge = quick(rubric_judge(f"openai:m@{url}", settings(tmp_path)))
    with pytest.raises(UserError, match=r"no reply \(.*refused.*\), 8 times"):
        judge(["p"], ["a"])


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "give its API key in PREFLOOP_JUDGE_API_KEY"),
        (403, "give its API key in PREFLOOP_JUDGE_API_KEY"),
        (404, "mend the URL or the model's name"),
        ((307, {"Location": "http://127.0.0.1:1/"}, ""), "mend the URL"),
    ],
)
def test_what_no_try_mends_ends_at_once(status: Reply, remedy: str, tmp_path: Path) -> None:
    with serving(lambda *_: status) as server:
        with pytest.raises(UserError, match=remedy):
            rubric(server, tmp_path, judge_concurrency=1)(["p", "p"], ["a", "b"])
        assert len(server.asked) <= 2


def test_so_many_requests_at_once(tmp_path: Path) -> None:
    """The server answers only once so many wait; more than that it would see, too."""
    answers = [str(n) for n in range(12)]
    for most in (1, 4):
        together = threading.Barrier(most)

        def reply(prompt: str, before: int, together: threading.Barrier = together) -> Reply:
            together.wait(timeout=60)
            time.sleep(0.05)
            return "[[5]]"

        with serving(reply) as server:
            judge = rubric(server, tmp_path / str(most), judge_concurrency=most)
            assert judge(["p"] * 12, answers) == [5.0] * 12
        assert server.most_at_once == most


# --- keys and caches -----------------------------------------------------------------------------


def test_the_key_goes_into_the_header_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFLOOP_JUDGE_API_KEY", "sk-secret")
    with serving(by_length) as server:
        judge = rubric(server, tmp_path)
        judge(["p"], ["abc"])
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    (kept,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "sk-secret" not in kept.read_text() + repr(judge) + str(judge.endpoint)
    echo = (401, {}, '{"error": {"message": "wrong key sk-secret"}}')
    with serving(lambda *_: echo) as server, pytest.raises(UserError) as caught:
        rubric(server, tmp_path)(["p"], ["other"])
    told = capsys.readouterr()
    assert "sk-secret" not in str(caught.value) + told.err + told.out
    assert r"wrong key ***" in str(caught.value)


def test_replies_are_asked_for_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(by_length) as server:
        rubric(server, tmp_path)(["p"], ["abc"])
        judge = rubric(server, tmp_path)
        assert judge(["p", "p"], ["abc", "abc"]) == [3.0, 3.0]
        assert (judge.endpoint.usage.requests, judge.endpoint.usage.cached) == (0, 1)
        for other in ({"judge_args": "{}"}, {"judge_prompt": prompt_file(tmp_path)}):
            judge = rubric(server, tmp_path, **other)
            judge(["p"], ["abc"])
            assert judge.endpoint.usage.requests == 1
        for cut, whole in (('{"', None), ("[[5]]", "[[3]]")):  # not whole; flipped
            for path in (tmp_path / "cache").rglob("*.json"):
                text = path.read_text()
                path.write_text(text.replace(whole, cut) if whole else cut)
            capsys.readouterr()
            judge = rubric(server, tmp_path)
            assert judge(["p"], ["abc"]) == [3.0]
            assert judge.endpoint.usage.requests == 1
            assert "is damaged; tried again" in capsys.readouterr().err


def prompt_file(
    tmp_path: Path, text: str = "{prompt} <answer>\n{answer}\n</answer> [[1]]-[[5]]"
) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    return path


def test_a_prompt_of_ones_own_has_its_own_scale(tmp_path: Path) -> None:
    replies = iter(["[[7]]", "[[3.5]]"])
    with serving(lambda *_: next(replies)) as server:
        judge = rubric(server, tmp_path, judge_prompt=prompt_file(tmp_path))
        assert judge(["the prompt"], ["text"]) == [3.5]
    assert server.prompts[0] == "the prompt <answer>\ntext\n</answer> [[1]]-[[5]]"


@pytest.mark.parametrize(
    ("make", "text", "problem"),
    [
        (rubric_judge, "{prompt} [[1]] [[5]]", r"lacks \{answer\}"),
        (rubric_judge, "{prompt} {answer} [[5]]", "both ends of its scale"),
        (pairwise_judge, "{prompt} {answer_a}", r"lacks \{answer_b\}"),
    ],
)
def test_prompts_that_ask_nothing(
    make: Callable[..., Any], text: str, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        make("openai:m@http://h/v1", settings(tmp_path, judge_prompt=prompt_file(tmp_path, text)))
    with pytest.raises(UserError, match="cannot be read"):
        make("openai:m@http://h/v1", settings(tmp_path, judge_prompt=tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"judge": "openai:gpt"}, "give openai:MODEL@URL"),
        ({"judge": "openai:m@ftp://h"}, "give openai:MODEL@URL"),
        ({"judge": "openai:m@http://me:pw@h/v1"}, "would be written into records"),
        ({"judge": "openai:m@http://h/v1?key=x"}, "would be written into records"),
        ({"judge": "x:y", "judge_concurrency": 3}, "--judge-concurrency is read by an LLM judge"),
        ({"judge": "x:y", "judge_mode": "rubric"}, "--judge-mode is read by an LLM judge"),
        ({"judge": "openai:m@http://h/v1", "dtype": "float32"}, "--dtype is read by models"),
        ({"judge": "openai:m@http://h/v1", "form": "best", "min_score": 1.0}, "gives no scores"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        validate(RankConfig(data="x", output=tmp_path / "o.jsonl", **options))


@pytest.mark.parametrize(
    ("args", "problem"), [("{1}", "not JSON"), ('{"model": "x"}', "`model` is prefloop's own")]
)
def test_arguments_that_cannot_be_sent(args: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        rubric_judge("openai:m@http://h/v1", settings(tmp_path, judge_args=args))


# --- commands ------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("mode", ["pairwise", "rubric"])
def test_rank_by_an_llm(mode: str, tmp_path: Path) -> None:
    """The row that gets no verdict is left out and counted."""

    def says(prompt: str, before: int) -> Reply:
        if section(prompt, "prompt") == "rude" and "abcd" in prompt:
            return 400
        return (longer if mode == "pairwise" else by_length)(prompt, before)

    answers = ["ab", "abcd", "cd", "a"]
    rows = [{"prompt": prompt, "completions": answers} for prompt in ("p", "rude")]
    with serving(says) as server:
        config = RankConfig(
            data=str(write(tmp_path / "s.jsonl", rows)),
            judge=server.judge,
            judge_mode=mode,  # type: ignore[arg-type]
            judge_cache=tmp_path / "cache",
            output=tmp_path / "r.jsonl",
        )
        result = rank.run(config)
    (row,) = [json.loads(line) for line in config.output.read_text().splitlines()]
    assert row["tiers"] == [[1], [0, 2], [3]]
    assert row["labeller"] == server.judge
    assert row.get("scores") == (None if mode == "pairwise" else [2.0, 4.0, 2.0, 1.0])
    assert result["left_out"] == {"no verdict of the judge": 1}
    failed = {"pairwise": 6, "rubric": 1}[mode]
    assert result["judge_usage"]["failed"] == failed


def test_winrate_by_an_llm_that_compares(tmp_path: Path) -> None:
    def says(prompt: str, before: int) -> Reply:
        return 400 if section(prompt, "prompt") == "rude" else longer(prompt, before)

    write(tmp_path / "a.jsonl", [{"prompt": p, "completions": ["abc", "a"]} for p in ("p", "rude")])
    write(tmp_path / "b.jsonl", [{"prompt": p, "completion": "ab"} for p in ("p", "rude")])
    with serving(says) as server:
        result = winrate.run(
            WinrateConfig(
                answers=tmp_path / "a.jsonl",
                baseline=tmp_path / "b.jsonl",
                judge=server.judge,
                judge_cache=tmp_path / "cache",
            )
        )
    assert result["win_rate"]["mean"] == 0.5
    assert result["prompts_without_verdict"] == 1
    assert result["pairs_without_verdict"] == 2
    assert result["order_agreement"] == 1.0
    assert result["judge_usage"]["requests"] == 4


def test_winrate_by_an_llm_that_scores(tmp_path: Path) -> None:
    def says(prompt: str, before: int) -> Reply:
        return 400 if section(prompt, "answer") == "bad" else by_length(prompt, before)

    write(tmp_path / "a.jsonl", [{"prompt": p, "completions": ["abc", "bad"]} for p in "pq"])
    write(
        tmp_path / "b.jsonl",
        [{"prompt": "p", "completion": "ab"}, {"prompt": "q", "completion": "bad"}],
    )
    with serving(says) as server:
        result = winrate.run(
            WinrateConfig(
                answers=tmp_path / "a.jsonl",
                baseline=tmp_path / "b.jsonl",
                judge=server.judge,
                judge_mode="rubric",
                judge_cache=tmp_path / "cache",
            )
        )
    assert (result["win_rate"]["mean"], result["score"]["mean"]) == (1.0, 3.0)
    assert (result["prompts_without_verdict"], result["answers_without_score"]) == (1, 3)
