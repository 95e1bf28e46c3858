"""A token beyond the embeddings is told with its row, before the work."""

import json

import pytest

RIGHT = "token <tool> (261) is beyond the model's 261 embeddings"
TRAIN = "--device cpu --max-length 128 --batch-size 2 --lr 1e-3".split()
ANSWER = "--device cpu --max-length 128 --max-new-tokens 4".split()


def one_line(told, *parts):
    assert told.code == 2
    assert len(told.err.strip().splitlines()) == 1
    assert all(part in told.err for part in parts), told.err


def test_check_and_sft(case, models, prefloop, tmp_path):
    model = ("--model", models / "wide-tokenizer", "--data", "rows.jsonl")
    one_line(prefloop("check", *model, "--kind", "demonstration"), "rows.jsonl:2", RIGHT, "resize")
    told = prefloop("sft", *model, "--output", tmp_path / "run", *TRAIN)
    assert told.code == 2 and "rows.jsonl:2: " + RIGHT in told.err
    assert "Traceback" not in told.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["generate", "sample"])
def test_prompts(command, case, models, prefloop, tmp_path):
    (case / "p.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "a <tool>"}\n')
    words = ("--model", models / "wide-tokenizer", "--data", "p.jsonl", *ANSWER)
    told = prefloop(command, *words, "--output", tmp_path / "a.jsonl")
    one_line(told, "p.jsonl:2: " + RIGHT)
    assert not (tmp_path / "a.jsonl").exists()


TEXTS = ["fine", "a <tool>", "good", "a </tool> or (two) <tool>"]


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo"])
def test_bad_rows_drop_leaves_them_out(command, case, models, prefloop):
    rows = [{"prompt": text, "completion": "b", "chosen": "c", "rejected": "d"} for text in TEXTS]
    rows = [{k: row[k] for k in COLUMNS[command]} for row in rows]
    for name in ("d", "e"):
        (case / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", models / "wide-tokenizer", *TRAIN, "--eval-data", "e.jsonl"]
    if command == "ppo":
        words += ["--reward-function", "tests.training.rewards:by_length", "--max-new-tokens", 4]
    words += ["--data", "d.jsonl", "--bad-rows", "drop", "--output", "run"]
    told = prefloop(command, *words)
    assert told.code == 0, told.err
    record = json.loads((case / "run/run.json").read_text())
    for of in ("data", "eval_data"):
        counts = record["rows"][of]
        # One reason, whatever the token and the row.
        reason = "bad row: token is beyond the model's N embeddings"
        assert (counts["read"], counts["used"], counts["dropped"]) == (4, 2, {reason: 2})
    listed = [json.loads(x) for x in (case / "run/bad_rows.jsonl").read_text().splitlines()]
    assert [x["line"] for x in listed] == ["d.jsonl:2", "d.jsonl:4", "e.jsonl:2", "e.jsonl:4"]
    assert RIGHT in listed[0]["reason"]


COLUMNS = {
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
    "ppo": ("prompt",),
}


def test_check_counts_them_with_the_other_bad_rows(case, models, prefloop):
    lines = [json.dumps({"prompt": text, "completion": "b"}) for text in TEXTS]
    (case / "d.jsonl").write_text("\n".join([*lines, '{"prompt": "p", "completion": ""}', ""]))
    words = ("--model", models / "wide-tokenizer", "--data", "d.jsonl", "--kind", "demonstration")
    told = prefloop("check", *words)
    assert told.code == 2
    assert "read 5 rows, used 2" in told.out
    assert f"bad row: d.jsonl:2: {RIGHT}" in told.out
    assert "2 more bad rows" in told.err
    assert prefloop("check", *words, "--bad-rows", "drop").code == 0
