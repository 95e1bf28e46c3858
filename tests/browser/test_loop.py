"""End to end: a pipeline of two rounds waits for what the test ranks in the browser."""

import json
import subprocess
import sys

from tests.labelling.small import rows
from tests.training.small import write_world

PIPELINE = """
stages:
  - rounds: 2
    start: model
    stages:
      - name: sample
        command: sample
        settings: {model: "${policy}", data: few.jsonl, output: "samples-${round}.jsonl",
                   to_labels: "labels.db#round-${round}", samples_per_prompt: 3, seed: 1,
                   max_length: 64, max_new_tokens: 6, device: cpu}
      - name: rankings
        command: label export
        settings: {store: labels.db, project: "round-${round}", output: "rankings-${round}.jsonl",
                   wait: true, wait_seconds: 0.1}
      - name: reward
        command: reward
        settings: {model: "${policy}", data: "${rankings}", max_steps: 2, lr: 1e-3,
                   max_length: 128, device: cpu}
      - name: dpo
        command: dpo
        settings: {model: "${policy}", data: "${rankings}", max_steps: 2, lr: 1e-3,
                   max_length: 128, device: cpu}
"""


def test_two_rounds_with_labels_from_the_browser(serve, enter, tmp_path):
    write_world(tmp_path)
    prompts = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "few.jsonl").write_text("".join(prompts))
    (tmp_path / "p.yaml").write_text(PIPELINE)
    server = serve(rows(1))
    with server.store.write() as t:  # one labeller will do, and overlap would need a second
        t.connection.exec_driver_sql("UPDATE labellers SET active = 0 WHERE name = 'bob'")
    page = enter(server, "ann").page
    words = [sys.executable, "-m", "prefloop", "run", "p.yaml", "--output", "runs"]
    with (tmp_path / "log").open("w") as log:
        pipeline = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
        done = 0
        while pipeline.poll() is None:
            page.wait_for_timeout(50)
            if page.locator("#work:not([hidden])").count():
                for key in ("2", "1", "3", "3", "Enter"):
                    page.keyboard.press(key)
                done += 1
                page.locator("#progress", has_text=f"{done} done").wait_for()
    assert pipeline.returncode == 0, (tmp_path / "log").read_text()
    assert done >= 7
    for turn in (1, 2):
        for name in ("reward", "dpo"):
            run = json.loads((tmp_path / f"runs/{name}-{turn}/run.json").read_text())
            assert run["status"] == "finished"
            assert (tmp_path / f"runs/{name}-{turn}/model/model.safetensors").exists()
    models = server.select("SELECT DISTINCT model FROM snapshots")
    assert models == [("model",), ("runs/dpo-1",)]  # the second round asks the new policy
