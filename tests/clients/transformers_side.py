"""Transformers and PEFT: log-probs of answers, and scores as rewardbench's scripts read them."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

folder = Path(sys.argv[1])
rows = json.loads((folder / "rows.json").read_text())


def log_probs(model):
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float().log_softmax(-1)
        told = logits.gather(1, ids[0, 1:, None])[:, 0]
        found.append(told[len(row["prompt_ids"]) - 1 :].sum().item())
    return found


policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32").eval()
base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
adapter = PeftModel.from_pretrained(base, folder / "adapter").eval()

tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
scorer = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype="float32")
read = pipeline("text-classification", model=scorer, tokenizer=tokenizer)
pairs = [json.loads(line) for line in (folder / "rewardbench.jsonl").read_text().splitlines()]
scores = []
for pair in pairs:
    for name in ("chosen", "rejected"):
        asked = {"role": "user", "content": pair["prompt"]}
        chat = [asked, {"role": "assistant", "content": pair[name]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        scores.append(read(text, function_to_apply="none", add_special_tokens=False)[0]["score"])
facts = {"policy": log_probs(policy), "adapter": log_probs(adapter), "scores": scores}
print("@@" + json.dumps(facts))
