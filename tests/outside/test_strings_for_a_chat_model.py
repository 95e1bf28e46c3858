"""Strings as rows, and a chat model: said once, or taken as turns with --chat."""

import pytest

NOTE = "the rows are strings: the chat template is not applied"


def test_check_says_that_the_template_is_not_applied(models, case, prefloop):
    told = prefloop("check", "--model", models / "chatml", "--data", "strings.jsonl")
    assert told.code == 0
    assert told.out.count(NOTE) == 1


def test_check_with_chat_applies_it(models, case, prefloop):
    told = prefloop("check", "--model", models / "chatml", "--data", "strings.jsonl", "--chat")
    assert told.code == 0
    assert NOTE not in told.out
    assert "<|im_start|>user\\nName thing 0.<|im_end|>" in told.out
    assert "[[Heron.<|im_end|>]]" in told.out


@pytest.mark.parametrize("command", ["dpo", "reward", "ppo"])
def test_training_says_it_once_or_takes_turns(models, case, prefloop, command):
    words = [command, "--model", models / "chatml", "--data", "strings.jsonl", "--device", "cpu"]
    words += ["--max-steps", 1, "--batch-size", 2]
    if command == "ppo":
        words += ["--reward-function", "tests.training.rewards:by_length", "--max-new-tokens", 4]
    told = prefloop(*words, "--output", "a")
    assert told.code == 0, told.err
    assert told.err.count(NOTE) == 1
    told = prefloop(*words, "--output", "b", "--chat")
    assert told.code == 0, told.err
    assert NOTE not in told.err


def test_sft_takes_turns(models, case, prefloop):
    (case / "sft.jsonl").write_text('{"prompt": "Name a bird.", "completion": "Heron."}\n' * 4)
    words = ["sft", "--model", models / "chatml", "--data", "sft.jsonl", "--device", "cpu"]
    told = prefloop(*words, "--output", "a")
    assert told.err.count(NOTE) == 1
    assert NOTE not in prefloop(*words, "--output", "b", "--chat").err


def test_evaluation_reads_the_same_row_in_two_ways(models, case, prefloop):
    common = ["--data", "strings.jsonl", "--device", "cpu"]
    made = prefloop(
        "reward", "--model", models / "chatml", "--output", "rm", "--max-steps", 1, *common
    )
    assert made.err.count(NOTE) == 1
    words = ["evaluate", "reward-model", "--reward-model", "rm", *common]
    plain = prefloop(*words)
    chat = prefloop(*words, "--chat")
    assert plain.code == chat.code == 0
    assert NOTE not in plain.err  # it was said where the reward model was trained on strings
    assert NOTE not in chat.err
    assert plain.out != chat.out


def test_generate_takes_the_prompt_as_a_message(models, case, prefloop):
    words = ["generate", "--model", models / "chatml", "--prompt", "Name a bird.", "--device"]
    words += ["cpu", "--max-new-tokens", 4, "--max-length", 64]
    assert NOTE in prefloop(*words).err
    told = prefloop(*words, "--chat")
    assert told.code == 0
    assert NOTE not in told.err


def test_sample_takes_prompts_as_messages(models, case, prefloop):
    words = ["sample", "--model", models / "chatml", "--data", "strings.jsonl", "--device", "cpu"]
    words += ["--max-new-tokens", 4, "--samples-per-prompt", 2, "--max-prompts", 2]
    told = prefloop(*words, "--chat", "--output", "s.jsonl")
    assert told.code == 0, told.err
    assert (
        '"prompt": [{"role": "user", "content": "Name thing 0."}]' in (case / "s.jsonl").read_text()
    )


def test_check_tells_mixed_forms_and_special_tokens(models, case, prefloop):
    chat = '{"prompt": [{"role": "user", "content": "<|im_end|>"}], "chosen": "a", "rejected": "b"}'
    text = (case / "strings.jsonl").read_text() + chat + "\n"
    (case / "mixed.jsonl").write_text(text)
    told = prefloop("check", "--model", models / "chatml", "--data", "mixed.jsonl")
    count = text.count("\n")
    assert f"mixed forms: {count - 1} rows are strings, 1 are chat messages" in told.out
    assert f"{count - 1} of {count} rows are strings" in told.out
    assert f"special token <|im_end|> in their texts, the first at mixed.jsonl:{count}" in told.out
