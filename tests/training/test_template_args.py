"""--template-args reach the chat template of every command that renders chats."""

import pytest
import yaml
from transformers import AutoTokenizer

from prefloop import commands
from prefloop.config import CheckConfig, CompareConfig, GenerateConfig
from prefloop.data.encoder import Encoder
from prefloop.errors import UserError
from prefloop.models.load import load_policy
from prefloop.records import Message
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import CONFIGS, CPU, REWARDS, lines, write_rows

# As Qwen 3: without thinking, the generation prompt and the turn open with an empty thought.
TEMPLATE = (
    "{% set thought = '' if enable_thinking | default(true) else '<think>\n\n</think>\n\n' %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (thought if m.role == 'assistant' "
    "else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + thought }}{% endif %}"
)
ARGS = '{"enable_thinking": false}'
CHAT = [{"role": "user", "content": "Hi"}]
SAID = [[{"role": "assistant", "content": text}] for text in ("Yes", "No")]
ROW = {"prompt": CHAT, "completion": SAID[0], "chosen": SAID[0], "rejected": SAID[1]}


@pytest.fixture
def model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer(template=TEMPLATE, eos="<|im_end|>").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_prompts_and_answers_follow(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for args in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        encoder = load_policy(str(model), CPU, template_args=args).encoder
        right = tokenizer.apply_chat_template(
            CHAT, tokenize=True, return_dict=False, add_generation_prompt=True, **args
        )
        assert encoder.prompt((Message("user", "Hi"),)) == right
    assert len(right) < len(
        Encoder(tokenizer, {"enable_thinking": False}).prompt((Message("user", "Hi"),))
    )


@pytest.mark.parametrize("command", CONFIGS)
def test_training_takes_and_records_them(command, model, tmp_path):
    keys = {"sft": ("prompt", "completion"), "ppo": ("prompt",)}
    row = {key: ROW[key] for key in keys.get(command, ("prompt", "chosen", "rejected"))}
    data = write_rows(tmp_path / "rows.jsonl", [row] * 2)
    more = (
        {"reward_function": f"{REWARDS}:by_length", "max_new_tokens": 3} if command == "ppo" else {}
    )
    ends = []
    for name, args in (("a", "{}"), ("b", ARGS)):
        config = CONFIGS[command](
            model=str(model),
            data=str(data),
            output=tmp_path / name,
            batch_size=2,
            max_steps=1,
            device="cpu",
            template_args=args,
            **more,
        )
        run = getattr(commands, command)(config)
        ends.append(lines(run.directory)[-1])
        saved = yaml.safe_load((run.directory / "config.yaml").read_text())
        assert saved["template_args"] == args
    assert ends[0]["grad_norm"] != ends[1]["grad_norm"]


def test_answers_follow(model, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Hi", "a boat", "the ant")]
    data = write_rows(tmp_path / "p.jsonl", rows)
    short = {"max_new_tokens": 12, "device": "cpu"}
    said = []
    for name, args in (("a", "{}"), ("b", ARGS)):
        output = tmp_path / f"{name}.jsonl"
        shared = {"data": str(data), "template_args": args, **short}
        commands.generate(GenerateConfig(model=str(model), output=output, **shared))
        compared = {"models": (f"x={model}",), "judge": f"{REWARDS}:by_length", **shared}
        commands.compare(CompareConfig(sft=str(model), output=tmp_path / name, **compared))
        said.append((output.read_text(), (tmp_path / name / "answers.jsonl").read_text()))
    assert said[0][0] != said[1][0] and said[0][1] != said[1][1]


def test_check_shows_them(model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{k: ROW[k] for k in ("prompt", "completion")}])
    settings = {"model": str(model), "data": str(data), "kind": "demonstration"}
    commands.check(CheckConfig(**settings))
    assert "<think>" not in capsys.readouterr().out
    commands.check(CheckConfig(**settings, template_args=ARGS))
    assert "</think>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ('{"enable_thinkin": false}', "reads no `enable_thinkin`"),
        ('{"enable_thinking": nope}', "not JSON"),
        ("[1]", "give a JSON mapping"),
    ],
)
def test_wrong_ones_are_one_line(args, message, model):
    with pytest.raises(UserError, match=message) as error:
        commands.check(CheckConfig(model=str(model), template_args=args))
    assert "\n" not in str(error.value)


STRINGS = {"prompt": "Hi", "completion": " a", "chosen": " a", "rejected": " b"}
IN_VAIN = r"^--template-args .*enable_thinking.* give --chat .* leave --template-args out"


def answering(tmp_path, command):
    """Settings of a command that answers or trains, but for its rows."""
    if command in CONFIGS:
        more = {"reward_function": f"{REWARDS}:by_length"} if command == "ppo" else {}
        return {"output": tmp_path / "out", "batch_size": 1, "max_steps": 1, **more}
    named = {"models": (f"x={tmp_path / 'm'}",), "judge": f"{REWARDS}:by_length"}
    return {
        "check": {"kind": "prompt"},
        "generate": {"output": tmp_path / "out.jsonl", "max_new_tokens": 2},
        "sample": {"output": tmp_path / "out.jsonl", "max_new_tokens": 2},
        "compare": {"output": tmp_path / "out", "max_new_tokens": 2, **named},
    }[command]


@pytest.mark.parametrize("command", [*CONFIGS, "check", "generate", "sample", "compare"])
def test_with_strings_alone_they_are_in_vain(command, model, tmp_path, capsys):
    keys = {"sft": ("prompt", "completion"), "reward": ("prompt", "chosen", "rejected")}
    keys["dpo"] = keys["reward"]
    row = {key: STRINGS[key] for key in keys.get(command, ("prompt",))}
    chat = {key: ROW[key] for key in row}
    same = answering(tmp_path, command)
    config = commands.COMMANDS[command].config
    same |= {"sft" if command == "compare" else "model": str(model), "template_args": ARGS}
    same |= {} if command == "check" else {"device": "cpu"}

    def run(rows, **more):
        data = str(write_rows(tmp_path / "rows.jsonl", rows))
        getattr(commands, command)(config(data=data, **same, **more))

    with pytest.raises(UserError, match=IN_VAIN):
        run([row, row])
    assert not list(tmp_path.glob("out*"))
    run([row, row], chat=True)
    if command in CONFIGS:
        same["output"] = tmp_path / "out2"
    run([row, chat])  # something reads them


def test_a_prompt_of_the_command_line_is_a_string(model):
    with pytest.raises(UserError, match=IN_VAIN):
        commands.generate(GenerateConfig(model=str(model), prompt=("Hi",), template_args=ARGS))


def test_ppos_demonstrations_may_be_what_reads_them(model, tmp_path):
    shown = {"prompt": CHAT, "completion": SAID[0]}
    config = {"ptx_coef": 0.5, "template_args": ARGS, "device": "cpu", "max_new_tokens": 2}
    config |= answering(tmp_path, "ppo") | {"model": str(model)}
    config["data"] = str(write_rows(tmp_path / "p.jsonl", [{"prompt": "Hi"}]))
    config["sft_data"] = str(write_rows(tmp_path / "s.jsonl", [shown]))
    commands.ppo(CONFIGS["ppo"](**config))
    config["sft_data"] = str(write_rows(tmp_path / "s.jsonl", [STRINGS]))
    with pytest.raises(UserError, match=IN_VAIN):
        commands.ppo(CONFIGS["ppo"](**config | {"output": tmp_path / "other"}))
