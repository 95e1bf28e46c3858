"""lm-eval: a local task whose choices are the answers; log-probs of each."""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

folder = Path(sys.argv[1])
(folder / "tasks").mkdir(exist_ok=True)
(folder / "tasks" / "local.yaml").write_text(f"""
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")


def log_probs(arguments):
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"{arguments},dtype=float32,device=cpu",
        tasks=["local_answers"],
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["local_answers"], key=lambda s: s["doc_id"])
    return [float(r[0]) for sample in samples for r in sample["filtered_resps"]]


facts = {
    "policy": log_probs(f"pretrained={folder}/policy"),
    "adapter": log_probs(f"pretrained={folder}/base,peft={folder}/adapter"),
}
print("@@" + json.dumps(facts))
