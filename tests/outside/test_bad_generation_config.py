"""Sampling settings that Transformers refuses to save do not end a finished training."""

import json

from transformers import GenerationConfig


def test_it_trains_and_exports(models, prefloop, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n')
    words = ("--model", models / "bad-generation-config", "--data", tmp_path / "rows.jsonl")
    told = prefloop("sft", *words, "--output", tmp_path / "run", "--device", "cpu")
    assert told.code == 0, told.err
    file = tmp_path / "run" / "model" / "generation_config.json"
    saved = json.loads(file.read_text())
    assert (saved["temperature"], saved["top_p"], saved["eos_token_id"]) == (0.9, 0.6, 4)
    GenerationConfig.from_pretrained(file.parent).validate(strict=True)
