"""TRL 1.16: log-probs of its DPO's reference, scores as its reward trainer logs them."""

import json
import sys
from pathlib import Path

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder = Path(sys.argv[1])
pairs = [json.loads(line) for line in (folder / "strings.jsonl").read_text().splitlines()]
settings = {
    "output_dir": str(folder / "trl"),
    "per_device_train_batch_size": len(pairs),
    "per_device_eval_batch_size": len(pairs),
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def log_probs(path):
    """Those of the chosen and of the rejected answers, before the first step."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        args=trl.DPOConfig(**settings, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.get_train_dataloader()
    columns = trainer.train_dataset
    both = zip(columns["ref_chosen_logps"], columns["ref_rejected_logps"], strict=True)
    return [value for pair in both for value in pair]


def scores(path):
    """Of each pair, from the mean and the margin that an evaluation of it alone logs."""
    found = []
    for pair in pairs:
        tokenizer = AutoTokenizer.from_pretrained(path)
        rows = Dataset.from_list([pair])
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype="float32")
        args = trl.RewardConfig(**settings, logging_steps=1)
        trainer = trl.RewardTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        told = trainer.evaluate()
        mean, margin = told["eval_mean_reward"], told["eval_margin"]
        found += [mean + margin / 2, mean - margin / 2]
    return found


facts = {"policy": log_probs(folder / "policy"), "scores": scores(folder / "reward")}
print("@@" + json.dumps(facts))
