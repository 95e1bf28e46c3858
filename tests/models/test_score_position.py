"""A scorer is read where its maker trained it: the scores of plain Transformers, by every way."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefloop import commands
from prefloop.config import PPOConfig, RewardConfig
from prefloop.data.batches import to_batches
from prefloop.data.tokenize import stop_token_ids, tokenize, with_answers
from prefloop.errors import UserError
from prefloop.models.heads import answer_scores
from prefloop.models.load import load_scorer
from prefloop.records import Message, Prompt, Ranking, RowCounts, text_to_json
from prefloop.rewards.judges import load_judge
from prefloop.rewards.scorers import token_scorer
from tests.tiny import CHATML, tiny_model, tiny_tokenizer
from tests.training.small import CPU, write_rows

LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_start|>\n\n' + (m.content | trim) "
    "+ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else "
    "m.role %}{{ '<|im_start|>' + role + '\n' + (m.content | trim) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# The last turn has an empty thought before its answer, earlier ones have none.
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Roles are plain text here, and EOS ends every turn.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3, "zephyr": ZEPHYR}
PADS = {"own pad": "<pad>", "pad is eos": "<eos>", "no pad": None}

U, A = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
PROMPTS = [(U("the boat"),), (U("took in"), A("that oath"), U("a bath"))]
ANSWERS = ["the ant", " thin\nboat ", "in"]


def scorer_folder(folder, template=None, pad="<pad>", **config):
    """A reward model as another program leaves it, its head ten times as wide as usual."""
    tokenizer = tiny_tokenizer(chat=template is not None, template=template, eos="<eos>")
    torch.manual_seed(3)
    settings = tiny_model("llama").config
    settings.num_labels, settings.pad_token_id = (
        1,
        tokenizer.convert_tokens_to_ids(pad) if pad else None,
    )
    settings.update(config)
    model = AutoModelForSequenceClassification.from_config(settings)
    torch.nn.init.normal_(model.score.weight)
    tokenizer.pad_token = pad
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def usual(folder, prompt, answer):
    """The score that Transformers gives the whole rendered chat, or the text and its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    if isinstance(prompt, str):
        ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
    else:
        chat = [{"role": m.role, "content": m.content} for m in (*prompt, A(answer))]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    mean = getattr(model.config, "reward_mean", 0.0)
    return model(torch.tensor([ids])).logits.item() - mean


def read_by_ranking(folder, prompt, answers):
    scorer = load_scorer(folder, CPU)
    said = answers if isinstance(prompt, str) else [(A(answer),) for answer in answers]
    record = Ranking(prompt, tuple(said), tuple((i,) for i in range(len(answers))))
    (example,) = tokenize([record], scorer.encoder, 256, "error", RowCounts())
    with torch.no_grad():
        (batch,) = to_batches([example], 999, CPU)
        return answer_scores(scorer, batch).tolist()


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_foreign_chat_scorer_is_read_the_usual_way(name, pad, tmp_path):
    folder = scorer_folder(tmp_path, TEMPLATES[name], pad)
    judge = load_judge(folder, device="cpu")
    for prompt in PROMPTS:
        right = [usual(folder, prompt, answer) for answer in ANSWERS]
        assert max(right) - min(right) > 0.1
        assert judge([prompt] * 3, ANSWERS) == pytest.approx(right, abs=1e-4)
        assert read_by_ranking(folder, prompt, ANSWERS) == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS)
def test_a_foreign_scorer_of_plain_text_is_read_the_usual_way(pad, tmp_path):
    """Also where prompt and answer merge into one token ("a", "b"), which is whole the first."""
    folder = scorer_folder(tmp_path, None, pad)
    for prompt, answers in {"the a": ["b", " thin", "t"], "a": ["b", " b", "bath"]}.items():
        right = [usual(folder, prompt, answer) for answer in answers]
        found = load_judge(folder, device="cpu")([prompt] * 3, answers)
        assert found == pytest.approx(right, abs=1e-4)
        assert read_by_ranking(folder, prompt, answers) == pytest.approx(right, abs=1e-4)


def tokens_scored(folder, prompts, answers):
    """What PPO gives answers of these tokens."""
    scorer = load_scorer(folder, CPU)
    records = [Prompt(prompt, str(number)) for number, prompt in enumerate(prompts)]
    asked = tokenize(records, scorer.encoder, 256, "error", RowCounts())
    examples = [with_answers(e, [answer]) for e, answer in zip(asked, answers, strict=True)]
    config = PPOConfig(model="", data="", output=folder)
    score = token_scorer(scorer, config, stop_token_ids(scorer.tokenizer))
    return list(score(records, [""] * len(answers), examples).scores)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "zephyr"])
@pytest.mark.parametrize("pad", PADS.values(), ids=PADS)
def test_ppo_scores_the_sampled_tokens_with_the_templates_tail(name, pad, tmp_path):
    folder = scorer_folder(tmp_path, TEMPLATES[name], pad)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    stop = "<eos>" if name == "zephyr" else "<|im_end|>"
    ended = [*tokenizer("ant")["input_ids"], tokenizer.convert_tokens_to_ids(stop)]
    cut = tokenizer("thin boat")["input_ids"]
    found = tokens_scored(folder, PROMPTS, [ended, cut])
    assert found[0] == pytest.approx(usual(folder, PROMPTS[0], "ant"), abs=1e-4)
    chat = [{"role": m.role, "content": m.content} for m in PROMPTS[1]]
    ids = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    with torch.no_grad():
        assert found[1] == pytest.approx(model(torch.tensor([ids + cut])).logits.item(), abs=1e-4)


@pytest.mark.parametrize("name", TEMPLATES)
def test_cut_answers_are_scored_at_their_own_last_token(name, tmp_path):
    folder = scorer_folder(tmp_path, TEMPLATES[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    chat = [{"role": m.role, "content": m.content} for m in (*PROMPTS[1], A("thin boat"))]
    text = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("thin boat")
    ids = tokenizer("".join(text[:2]), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits.item()
    found = load_judge(folder, device="cpu")([PROMPTS[1]], ["thin boat"], [False])
    assert found == pytest.approx([right], abs=1e-4)


@pytest.mark.parametrize("key", ["reward_mean", "prefloop_score_position"])
def test_older_scorers_of_ours_are_read_at_the_stop_token(key, tmp_path):
    value = {"reward_mean": 0.5, "prefloop_score_position": "stop"}[key]
    folder = scorer_folder(tmp_path, CHATML, **{key: value})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    chat = [{"role": m.role, "content": m.content} for m in (*PROMPTS[0], A("ant"))]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
    with torch.no_grad():
        right = model(torch.tensor([ids[:-1]])).logits.item()
    right -= 0.5 if key == "reward_mean" else 0.0
    assert load_judge(folder, device="cpu")([PROMPTS[0]], ["ant"]) == pytest.approx(
        [right], abs=1e-4
    )
    ended = tokenizer("ant<|im_end|>")["input_ids"]
    assert tokens_scored(folder, PROMPTS[:1], [ended]) == pytest.approx([right], abs=1e-4)


def test_a_position_that_is_unknown_is_refused(tmp_path):
    folder = scorer_folder(tmp_path, CHATML, prefloop_score_position="first")
    with pytest.raises(UserError, match="prefloop_score_position 'first'"):
        load_judge(folder, device="cpu")([PROMPTS[0]], ["ant"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_we_train_scores_the_same_in_transformers(name, tmp_path):
    """Trained from a language model, and from a foreign scorer; read back by every way."""
    tokenizer = tiny_tokenizer(template=TEMPLATES[name], eos="<eos>")
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    rows = [
        {
            "prompt": text_to_json(prompt),
            "chosen": text_to_json((A(ANSWERS[0]),)),
            "rejected": text_to_json((A("in"),)),
        }
        for prompt in PROMPTS
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = commands.reward(
        RewardConfig(
            model=str(tmp_path / "lm"),
            data=str(data),
            output=tmp_path / "run",
            lr=1e-2,
            warmup=0.0,
            batch_size=2,
            device="cpu",
            dtype="float32",
        )
    )
    folder = str(run.model)
    assert (
        json.loads((run.model / "config.json").read_text())["prefloop_score_position"] == "rendered"
    )
    for prompt in PROMPTS:
        right = [usual(folder, prompt, answer) for answer in ANSWERS]
        assert load_judge(folder, device="cpu")([prompt] * 3, ANSWERS) == pytest.approx(
            right, abs=1e-4
        )
    # The stored mean is of the scores as they are read.
    means = [usual(folder, p, answer) for p in PROMPTS for answer in (ANSWERS[0], "in")]
    assert sum(means) == pytest.approx(0, abs=1e-4)
