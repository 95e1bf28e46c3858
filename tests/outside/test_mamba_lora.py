"""LoRA on a Mamba: the layers that PEFT refuses are left out."""

import pytest
from safetensors.torch import load_file

from prefloop.errors import UserError
from prefloop.models.adapters import add_lora
from tests.tiny import tiny_model

SETTINGS = "--device cpu --max-length 128 --batch-size 2 --lr 1e-3".split()


def test_it_trains(case, models, prefloop, tmp_path):
    words = ("sft", "--model", models / "mamba", "--data", "rows.jsonl", *SETTINGS)
    told = prefloop(*words, "--output", tmp_path / "run", "--lora-rank", 4)
    assert told.code == 0, told.err
    names = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors").keys()
    assert any("in_proj" in name for name in names)
    assert not any("out_proj" in name or "conv1d" in name for name in names)


def test_what_else_peft_refuses_is_one_line_with_its_remedy():
    module = tiny_model("llama")
    module.name_or_path = "m"
    with pytest.raises(UserError, match=r"m: PEFT cannot add adapters .* --lora-rank 0$"):
        add_lora(module, -1, 1.0)
