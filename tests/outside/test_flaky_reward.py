"""A reward function that fails once in the middle of a run: nothing that was finished is lost."""

import json
import sys

import pytest


@pytest.fixture
def words(case, models, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(case))
    monkeypatch.setenv("FLAG", str(tmp_path / "failed"))
    yield (
        f"ppo --model {models}/plain --data prompts.jsonl --reward-function rewards:flaky "
        f"--output {tmp_path}/run --device cpu --max-length 128 --batch-size 2 --lr 1e-3 "
        "--max-new-tokens 6 --epochs 6 --ppo-epochs 1"
    ).split()
    sys.modules.pop("rewards", None)


def test_the_second_command_goes_on_where_the_first_failed(words, prefloop, tmp_path):
    first = prefloop(*words)
    assert first.code == 2
    assert "TimeoutError" in first.err and "Traceback" not in first.err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5
    second = prefloop(*words)
    assert second.code == 0, second.err
    after = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert after[:5] == lines
    assert [json.loads(line)["step"] for line in after] == list(range(1, 13))
    assert (tmp_path / "run" / "model").is_dir()
    assert not (tmp_path / "run" / "checkpoints").exists()
