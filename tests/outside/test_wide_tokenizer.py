"""A token beyond the embeddings is told with its row, before the work."""

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
