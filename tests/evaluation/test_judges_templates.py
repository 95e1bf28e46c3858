"""Judges that are models see a prompt as they were trained to: by their own chat template, with the
row's tools and --template-args. Expected scores are plain Transformers'.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefloop import commands
from prefloop.config import CompareConfig, PPOConfig, RewardQualityConfig, WinrateConfig
from prefloop.config.labelling import LabelScoreConfig
from prefloop.data.tokenize import tokenize, with_answers
from prefloop.errors import UserError
from prefloop.generation.protocol import Sample
from prefloop.models.load import load_policy, load_reward_model
from prefloop.records import Prompt, RowCounts
from prefloop.rewards.scorers import model_scorer, reads_alike
from prefloop.training.ppo import build
from prefloop.training.start import start
from tests.labelling.small import open_store, put
from tests.models.test_score_position import (
    GEMMA,
    LLAMA3,
    PROMPTS,
    QWEN3,
    ZEPHYR,
    scorer_folder,
    usual,
)
from tests.tiny import CHATML, tiny_model, tiny_tokenizer
from tests.training.small import CPU, lines, write_rows

PRINTS = (
    "{{ 'the thought' if enable_thinking | default(true) else 'in' }}"
    "{% for tool in tools or [] %}{{ tool.function.name + '\n' }}{% endfor %}" + CHATML
)
TOOL = {"type": "function", "function": {"name": "tide", "description": "", "parameters": {}}}
ARGS = '{"enable_thinking": false}'
CHAT = [{"role": "user", "content": "the boat"}]
ROW = {"prompt": CHAT, "tools": [TOOL]}
ANSWERS = ["the ant", " thin oath", "in"]


def policy_folder(folder, template):
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(chat=template is not None, template=template, eos="<|im_end|>").save_pretrained(
        folder
    )
    return str(folder)


@torch.no_grad()
def plain(folder, prompt, answer, ended=True, tools=None, **args):
    """The score of the reward model's own rendering, cut after a cut answer's text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    chat = [*prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, **args)
    if not ended:
        text = "".join(text.rpartition(answer)[:2])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return model(torch.tensor([ids])).logits.item()


# --- PPO: whether sampled tokens are what the reward model was trained on ------------------------


class Says:
    """An engine that gives every prompt the same answers."""

    def __init__(self, answers):
        self.answers = answers

    def generate(self, prompts, n, sampling, seed, numbers=None, on_done=None):
        assert n == len(self.answers)
        stops = sampling.stop_token_ids
        return [
            [
                Sample(i, j, ids, (0.0,) * len(ids), "stop" if ids[-1] in stops else "length", 0)
                for j, ids in enumerate(self.answers)
            ]
            for i in range(len(prompts))
        ]

    def sync(self, model, version):
        pass


def ppo_scores(tmp_path, policy, scorer, rows, answers, **changes):
    """The scores that an iteration of PPO gives these answers to each row's prompt."""
    config = PPOConfig(
        model=policy,
        reward_model=scorer,
        data=str(write_rows(tmp_path / "rows.jsonl", rows)),
        output=tmp_path / "run",
        batch_size=len(rows),
        samples_per_prompt=len(answers),
        max_new_tokens=8,
        max_length=128,
        device="cpu",
        dtype="float32",
        **changes,
    )
    run, device = start(config, "ppo")
    ppo = build(config, device, run, lambda *_: Says(answers))
    return [sample["score"] for sample in next(iter(ppo.steps(0))).samples]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, ZEPHYR, QWEN3], ids=lambda t: t[:30])
@pytest.mark.parametrize("own", [CHATML, QWEN3], ids=["chatml", "qwen3"])
def test_ppo_scores_are_those_of_the_reward_models_own_template(own, template, tmp_path):
    """The policy's template is another, or the same; answers end with its stop token, or are cut.

    QWEN3 prints an empty thought before an answer, which a policy may have written, or not.
    """
    policy = policy_folder(tmp_path / "policy", own)
    scorer = scorer_folder(tmp_path / "rm", template)
    ids = AutoTokenizer.from_pretrained(policy)
    thought = "<think>\n\n</think>\n\n" if own == QWEN3 else ""
    said = ["the ant<|im_end|>", thought + "boat<|im_end|>", "thin oath"]
    answers = [tuple(ids(text)["input_ids"]) for text in said]
    found = ppo_scores(tmp_path, policy, scorer, [{"prompt": CHAT}], answers)
    right = [plain(scorer, CHAT, a, e) for a, e in (("the ant", 1), ("boat", 1), ("thin oath", 0))]
    assert max(right) - min(right) > 0.1
    assert found == pytest.approx(right, abs=1e-4)


def test_only_where_both_read_alike_do_sampled_tokens_count(tmp_path):
    """t-h-e as the policy wrote it is not the token that the text gives."""
    policy = policy_folder(tmp_path / "policy", CHATML)
    ids = AutoTokenizer.from_pretrained(policy)
    tokens = (*ids.convert_tokens_to_ids(["t", "h", "e"]), ids.convert_tokens_to_ids("<|im_end|>"))
    asked = ids.apply_chat_template(
        CHAT, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    same = scorer_folder(tmp_path / "same", CHATML)
    model = AutoModelForSequenceClassification.from_pretrained(same)
    with torch.no_grad():
        own = model(torch.tensor([[*asked, *tokens, *ids("\n")["input_ids"]]])).logits.item()
    assert abs(own - plain(same, CHAT, "the")) > 1e-3
    (tmp_path / "a").mkdir()
    assert ppo_scores(tmp_path / "a", policy, same, [{"prompt": CHAT}], [tokens]) == pytest.approx(
        [own], abs=1e-4
    )
    other = scorer_folder(tmp_path / "other", GEMMA)
    (tmp_path / "b").mkdir()
    assert ppo_scores(tmp_path / "b", policy, other, [{"prompt": CHAT}], [tokens]) == pytest.approx(
        [plain(other, CHAT, "the")], abs=1e-4
    )


def test_an_answer_that_another_stop_token_ended_is_read_as_ended(tmp_path):
    """The policy may stop at <eos>; the reward model's template ends answers with <|im_end|>."""
    policy = policy_folder(tmp_path / "policy", CHATML)
    config = json.loads((tmp_path / "policy/generation_config.json").read_text())
    config["eos_token_id"] = [2, 4]
    (tmp_path / "policy/generation_config.json").write_text(json.dumps(config))
    scorer = scorer_folder(tmp_path / "rm", CHATML)
    ids = AutoTokenizer.from_pretrained(policy)
    answer = tuple(ids("the ant<eos>")["input_ids"])
    found = ppo_scores(tmp_path, policy, scorer, [{"prompt": CHAT}], [answer])
    assert found == pytest.approx([plain(scorer, CHAT, "the ant")], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "alike"),
    [
        ({}, True),
        ({"template": CHATML.replace("assistant", "model")}, True),
        ({"template": "{{ bos_token }}" + CHATML}, False),
        ({"template": CHATML.replace("m_end|>\n", "m_end|>")}, False),
    ],
    ids=["same", "an own generation prompt alone", "bos", "what follows a turn"],
)
def test_what_reads_alike(kind, alike, tmp_path):
    policy = load_policy(policy_folder(tmp_path / "policy", CHATML), CPU)
    folder = scorer_folder(tmp_path / "rm", **({"template": CHATML} | kind))
    scorer = load_reward_model(folder, CPU)
    rows = [Prompt(prompt) for prompt in PROMPTS]
    assert reads_alike(scorer, policy, rows) is alike


def test_plain_text_is_scored_by_tokens_unless_it_merges_with_its_answer(tmp_path):
    """A BOS of the reward model's tokenizer alone is its own reading, too."""
    policy = load_policy(policy_folder(tmp_path / "policy", None), CPU)
    folder = scorer_folder(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = load_reward_model(folder, CPU)
    policy.tokenizer.eos_token = "<eos>"
    assert reads_alike(scorer, policy, [Prompt("the boat"), Prompt("in")])
    tiny_tokenizer(chat=False, bos=True, eos="<eos>").save_pretrained(folder)
    other = load_reward_model(folder, CPU)
    assert not reads_alike(other, policy, [Prompt("the boat")])
    (example,) = tokenize([Prompt("the boat")], policy.encoder, 64, "error", RowCounts())
    config = PPOConfig(model="", data="", output=tmp_path)
    score = model_scorer(other, policy, [Prompt("the boat")], config, frozenset({2}))
    ids = (*tokenizer(" ant")["input_ids"], 2)
    found = score([Prompt("the boat")], [" ant"], [with_answers(example, [ids])]).scores
    assert found == pytest.approx([usual(folder, "the boat", " ant")], abs=1e-4)


# --- tools and template arguments ----------------------------------------------------------------


def expected(folder, answer, ended=True):
    return plain(folder, CHAT, answer, ended, tools=[TOOL], enable_thinking=False)


@pytest.fixture
def scorer(tmp_path):
    folder = scorer_folder(tmp_path / "rm", PRINTS)
    other = plain(folder, CHAT, ANSWERS[0], tools=[TOOL])
    bare = plain(folder, CHAT, ANSWERS[0], enable_thinking=False)
    right = expected(folder, ANSWERS[0])
    assert min(abs(right - other), abs(right - bare)) > 1e-2
    return folder


def ids_of(folder, *texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("own", [PRINTS, PRINTS.replace("'in'", "'a boat'")], ids=["same", "other"])
def test_ppo_gives_them_to_the_reward_model(own, scorer, tmp_path):
    policy = policy_folder(tmp_path / "policy", own)
    answers = ids_of(policy, "the ant<|im_end|>", "thin oath")
    found = ppo_scores(tmp_path, policy, scorer, [ROW], answers, template_args=ARGS)
    right = [expected(scorer, "the ant"), expected(scorer, "thin oath", False)]
    assert found == pytest.approx(right, abs=1e-4)


def test_compare_gives_them_to_judge_and_reward_model(scorer, tmp_path):
    policy = policy_folder(tmp_path / "policy", PRINTS)
    second = scorer_folder(tmp_path / "rm2", PRINTS.replace("'in'", "'a boat'"))
    commands.compare(
        CompareConfig(
            sft=policy,
            models=(f"x={policy}",),
            data=str(write_rows(tmp_path / "rows.jsonl", [ROW])),
            judge=scorer,
            reward_model=second,
            best_of=1,
            template_args=ARGS,
            output=tmp_path / "out",
            samples_per_prompt=3,
            max_new_tokens=5,
            device="cpu",
            dtype="float32",
        )
    )
    for row in lines(tmp_path / "out", "answers.jsonl"):
        said = zip(row["completions"], row["truncated"], strict=True)
        right = [(expected(scorer, a, not cut), expected(second, a, not cut)) for a, cut in said]
        assert row["judge"] == pytest.approx([one for one, _ in right], abs=1e-4)
        assert row["reward_model"] == pytest.approx([two for _, two in right], abs=1e-4)


def test_winrate_gives_them_to_its_judge(scorer, tmp_path):
    sides = [
        write_rows(tmp_path / f"{n}.jsonl", [ROW | {"completion": answer}])
        for n, answer in enumerate(ANSWERS[:2])
    ]
    config = WinrateConfig(
        answers=sides[0],
        baseline=sides[1],
        judge=scorer,
        template_args=ARGS,
        device="cpu",
        dtype="float32",
    )
    told = commands.winrate(config)
    assert told["score"]["mean"] == pytest.approx(expected(scorer, ANSWERS[0]), abs=1e-4)
    assert told["baseline_score"]["mean"] == pytest.approx(expected(scorer, ANSWERS[1]), abs=1e-4)


def test_a_prompt_with_other_tools_is_another_prompt(scorer, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [ROW | {"completion": "a"}])
    two = write_rows(tmp_path / "two.jsonl", [{"prompt": CHAT, "completion": "b"}])
    with pytest.raises(UserError, match="no answer to the prompt"):
        commands.winrate(
            WinrateConfig(answers=one, baseline=two, judge=scorer, device="cpu", dtype="float32")
        )


def test_label_score_gives_them_to_its_models(scorer, tmp_path):
    put(tmp_path, [ROW | {"completions": ANSWERS}])
    store = str(tmp_path / "labels.db")
    commands.label_score(
        LabelScoreConfig(
            store=store,
            reward_model=(scorer,),
            strategy="gap",
            template_args=ARGS,
            device="cpu",
            dtype="float32",
        )
    )
    with open_store(tmp_path).read() as t:
        rows = t.connection.exec_driver_sql("SELECT completion, scores FROM responses").all()
    assert len(rows) == 3
    for completion, scores in rows:
        right = expected(scorer, json.loads(completion)[0]["content"])
        assert json.loads(scores) == pytest.approx([right], abs=1e-4)


def test_evaluate_reward_model_gives_them_to_it(scorer, tmp_path):
    said = [[{"role": "assistant", "content": text}] for text in ANSWERS[:2]]
    data = write_rows(tmp_path / "rows.jsonl", [ROW | {"chosen": said[0], "rejected": said[1]}])
    told = commands.reward_quality(
        RewardQualityConfig(
            reward_model=scorer, data=str(data), template_args=ARGS, device="cpu", dtype="float32"
        )
    )
    delta = expected(scorer, ANSWERS[0]) - expected(scorer, ANSWERS[1])
    assert told["log_loss"] == pytest.approx(math.log1p(math.exp(-delta)), abs=1e-4)


def test_a_template_that_ignores_tools_is_told_before_the_work(tmp_path):
    policy = policy_folder(tmp_path / "policy", PRINTS)
    blind = scorer_folder(tmp_path / "blind", CHATML)
    told = r"rows.jsonl:1: .*blind: the chat template ignores `tools`"
    with pytest.raises(UserError, match=told):
        ppo_scores(tmp_path, policy, blind, [ROW], ids_of(policy, "a<|im_end|>"))
    one = write_rows(tmp_path / "rows.jsonl", [ROW | {"completion": "a"}])
    with pytest.raises(UserError, match=told):
        commands.winrate(
            WinrateConfig(answers=one, baseline=one, judge=blind, device="cpu", dtype="float32")
        )
    put(tmp_path, [ROW | {"completions": ANSWERS}])
    with pytest.raises(UserError, match=r"#main: prompt 1: .*blind: the chat template ignores"):
        commands.label_score(
            LabelScoreConfig(
                store=str(tmp_path / "labels.db"),
                reward_model=(blind,),
                strategy="gap",
                device="cpu",
                dtype="float32",
            )
        )


def test_arguments_that_a_judge_does_not_read(scorer, tmp_path, capsys):
    """The policy's go to it alone, which is told; a judge's own are refused."""
    policy = policy_folder(tmp_path / "policy", PRINTS)
    plainer = scorer_folder(tmp_path / "plainer", CHATML)
    answers = ids_of(policy, "the ant<|im_end|>")
    rows = [{"prompt": CHAT}]
    found = ppo_scores(tmp_path, policy, plainer, rows, answers, template_args=ARGS)
    assert found == pytest.approx([plain(plainer, CHAT, "the ant")], abs=1e-4)
    assert "plainer: its chat template reads no `enable_thinking`" in capsys.readouterr().err
    one = write_rows(tmp_path / "one.jsonl", [ROW | {"completion": "a"}])
    config = WinrateConfig(
        answers=one, baseline=one, judge=plainer, template_args=ARGS, device="cpu", dtype="float32"
    )
    with pytest.raises(UserError, match=r"--template-args: no chat template of .*plainer reads"):
        commands.winrate(config)
    with pytest.raises(UserError, match="--template-args is read by models, and no --judge is one"):
        commands.winrate(
            WinrateConfig(answers=one, baseline=one, judge="a.b:c", template_args=ARGS)
        )
