"""Classic bugs, put into a copy of the source one at a time: each must make the suite fail.

    python -m tests.mutations

Says of each which test caught it. Fails if the unpatched copy does not pass, if a bug goes
unnoticed, or if the text that a bug replaces no longer stands in the source exactly once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAILED = 1  # pytest's exit status for tests that failed, and for nothing else


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in `file`; some of the fast `tests` must notice."""

    name: str
    file: str  # under src/prefloop
    old: str
    new: str
    tests: tuple[str, ...]


EXACT = "tests/oracle/test_exact.py"
BUGS = (
    Bug(
        "swapped chosen and rejected",
        "data/batches.py",
        "(first + w, first + l) for w in above",
        "(first + l, first + w) for w in above",
        ("tests/parity/test_end_to_end.py::test_dpo",),
    ),
    Bug(
        "mean for sum of log-probs",
        "training/preference.py",
        "log_probs = segment_sum(tokens, batch.target_answer, batch.answers)",
        "log_probs = segment_sum(tokens, batch.target_answer, batch.answers) / torch.bincount("
        "batch.target_answer)",
        ("tests/parity/test_end_to_end.py::test_dpo",),
    ),
    Bug(
        "bfloat16 weights rounded to the nearest",
        "training/adamw.py",
        "weights[part].copy_(round_stochastically(exact, generator))",
        "weights[part].copy_(exact)",
        ("tests/training/test_adamw.py::test_updates_too_small_for_bfloat16_are_not_lost",),
    ),
    Bug(
        "moments in the type of bfloat16 weights after resuming",
        "training/adamw.py",
        "value.to(p.device) if whole",
        "value.to(p.device, p.dtype) if whole",
        ("tests/training/test_adamw.py::test_a_loaded_state_leads_to_the_same_bits",),
    ),
    Bug(
        "reference not frozen",
        "training/reference.py",
        "return replace(policy, module=module, unread=unread)",
        "return policy",
        (f"{EXACT}::test_ppo_reports_the_enumerated_kl_and_objective",),
    ),
    Bug(
        "reward one token late",
        "losses/ppo.py",
        "at_the_end = torch.where(_is_last(mask), ",
        "at_the_end = torch.where(torch.nn.functional.pad(_is_last(mask), (1, -1)), ",
        ("tests/losses/test_ppo.py",),
    ),
    Bug(
        "Plackett-Luce lets tied answers compete with each other",
        "losses/reward.py",
        "rivals = wins | torch.eye(tiers.shape[1], dtype=torch.bool, device=tiers.device)",
        "rivals = (tiers[:, :, None] <= tiers[:, None, :]) & (tiers >= 0)[:, :, None] | torch.eye("
        "tiers.shape[1], dtype=torch.bool, device=tiers.device)",
        ("tests/losses/test_reward.py",),
    ),
    Bug(
        "a setting that group baselines do not read is accepted",
        "config/training.py",
        "gamma: Annotated[float, Within(0, 1), CRITIC]",
        "gamma: Annotated[float, Within(0, 1)]",
        ("tests/test_config.py",),
    ),
    Bug(
        "a range lets its open end in",
        "config/ranges.py",
        "lambda value: value > low",
        "lambda value: value >= low",
        ("tests/test_config.py::test_the_ends_of_each_kind_of_range",),
    ),
    Bug(
        "Python callers are not checked",
        "training/start.py",
        "    validate(config)\n",
        "",
        ("tests/test_config.py::test_python_callers_are_checked_too",),
    ),
    Bug(
        "a ranking's margin is dropped",
        "data/formats.py",
        "return [replace(_ranking(row, where), margin=_margin(row, where))]",
        "return [_ranking(row, where)]",
        ("tests/training/test_bad_input.py::test_a_rankings_margin_is_of_each_of_its_pairs",),
    ),
    Bug(
        "a margin that the loss does not read is accepted",
        "training/rows.py",
        "        if example.margin and refuse_margins:",
        "        if example.margin < 0 and refuse_margins:",
        ("tests/training/test_bad_input.py::test_a_margin_that_the_loss_does_not_read_is_told",),
    ),
    Bug(
        "columns stand by other prompts",
        "rewards/functions.py",
        "return {name: [row.get(name) for row in rows] for name in names}",
        "return {name: [row.get(name) for row in reversed(rows)] for name in names}",
        ("tests/outside/test_reward_needs_columns.py",),
    ),
    Bug(
        "weights of reward functions are not read",
        "rewards/functions.py",
        "sum(w * score for w",
        "sum(score for w",
        ("tests/evaluation/test_judges.py",),
    ),
    Bug(
        "half a step is saved",
        "training/step.py",
        "        before_update()\n",
        "        pass\n",
        ("tests/training/test_keeper.py",),
    ),
    Bug(
        "a monitor draws from the run's generators",
        "training/monitor.py",
        "        checkpoint.set_rng_state(before)\n",
        "        before\n",
        ("tests/training/test_monitor.py::test_a_monitored_run_is_the_run_without",),
    ),
    Bug(
        "of equal steps the last is kept",
        "training/watch.py",
        "if score > seen.best_score:",
        "if score >= seen.best_score:",
        ("tests/training/test_monitor.py::test_of_equal_steps_the_first_is_kept",),
    ),
    Bug(
        "one measurement below the best ends a run",
        "training/watch.py",
        "if seen.below < IN_A_ROW:",
        "if seen.below < 1:",
        ("tests/training/test_monitor.py::test_a_run_ends_when_it_is_gamed",),
    ),
    Bug(
        "settings given anew do not apply to a resumed optimiser",
        "training/checkpoint.py",
        "        group.update(settings)\n",
        "        settings\n",
        ("tests/training/test_going_back.py",),
    ),
    Bug(
        "an adaptive beta turns negative",
        "losses/ppo.py",
        "error * min(1.0, episodes / horizon)",
        "error * episodes / horizon",
        ("tests/losses/test_ppo.py",),
    ),
    Bug(
        "all ranks of a machine take its first GPU",
        "distributed.py",
        'return f"cuda:{local}"',
        'return "cuda:0"',
        ("tests/test_distributed.py",),
    ),
    Bug(
        "a scorer from elsewhere is read at the stop token",
        "models/model.py",
        'getattr(config, SCORE_POSITION, "stop" if old else "rendered")',
        'getattr(config, SCORE_POSITION, "stop")',
        ("tests/models/test_score_position.py",),
    ),
    Bug(
        "a reward model with another chat template scores the policy's tokens",
        "rewards/scorers.py",
        "    if reads_alike(model, policy, prompts):\n",
        "    if same_ids(policy.tokenizer, model.tokenizer):\n",
        ("tests/evaluation/test_judges_templates.py",),
    ),
    Bug(
        "label score forgets a row's tools",
        "evaluation/label_scores.py",
        '{**(extra or {}), "prompt": stored}',
        '{"prompt": stored}',
        ("tests/evaluation/test_judges_templates.py",),
    ),
    Bug(
        "a damaged checkpoint is gone on from",
        "resume.py",
        "        if not wrong:\n            return path, damaged",
        "        if path:\n            return path, damaged",
        ("tests/test_runs.py",),
    ),
    Bug(
        "a setting that came later counts as changed",
        "resume.py",
        "default_settings(config) | read_yaml",
        "{} | read_yaml",
        ("tests/training/test_going_back.py",),
    ),
    Bug(
        "a foreign role goes to the template as it is",
        "data/columns.py",
        '"human prompter".split()',
        '"prompter".split()',
        ("tests/outside/test_foreign_roles.py",),
    ),
    Bug(
        "answers keep the tokens of another tokenizer",
        "data/encoder.py",
        "if not sampled.ids or sampled.tokenizer != self.fingerprint:",
        "if not sampled.ids:",
        ("tests/generation/test_round_trip.py",),
    ),
    Bug(
        "a cut answer is trained as if it had ended",
        "data/encoder.py",
        "            if not ended:\n                return self.continued(answer)\n",
        "",
        ("tests/generation/test_round_trip.py",),
    ),
    Bug(
        "answers of one prompt see each other",
        "data/batches.py",
        "segments[add(answer, prompt, len(example.prompt))]",
        "segments[add(answer, len(segments) - 1, len(example.prompt))]",
        (f"{EXACT}::test_answers_that_share_a_prompt_have_the_enumerated_log_probs",),
    ),
    Bug(
        "runs of one way taken for the way itself",
        "intervals.py",
        "if ms_runs > ms_rest:",
        "if False:",
        ("tests/test_intervals.py::test_several_runs_are_a_draw_too",),
    ),
    Bug(
        "p-values of many pairs taken one by one",
        "evaluation/pairs.py",
        "replace(pair, p_holm=p)",
        "replace(pair, p_holm=pair.p)",
        ("tests/evaluation/test_pairs.py::test_every_pair_by_scipy",),
    ),
    Bug(
        "a prompt that one way's answer got no score to counted for the others",
        "evaluation/measure.py",
        "if all(any(answer.gold is not None for answer in run[prompt]) for run in runs)",
        "if True",
        (
            "tests/evaluation/test_compare.py"
            "::test_a_prompt_without_a_score_from_one_way_counts_for_none",
        ),
    ),
    Bug(
        "compared answers in the order of the ways",
        "labelling/compared.py",
        "texts = sorted(ended, key=lambda text: key_of(question.prompt, text))",
        "texts = list(ended)",
        ("tests/labelling/test_compared.py::test_the_order_in_the_store_tells_nothing",),
    ),
    Bug(
        "a tie with a flagged answer counted as a tie",
        "evaluation/labelled.py",
        "if ranks[i] == ranks[j] and flagged & {i, j, None}:",
        "if False:",
        ("tests/evaluation/test_people.py::test_flags_and_skips_are_told_and_are_no_ties",),
    ),
    Bug(
        "judgements of one prompt taken for independent",
        "evaluation/preferences.py",
        "sums = np.zeros((count, influence.shape[1]))\n    np.add.at(sums, index, influence)",
        "count, sums = len(influence), influence",
        ("tests/evaluation/test_preferences.py::test_intervals_hold_the_truth",),
    ),
)


def patched(bug: Bug, tree: Path) -> tuple[Path, str]:
    """The file in the copy that the bug changes, and its text with the bug."""
    path = tree / "src/prefloop" / bug.file
    text = path.read_text(encoding="utf-8")
    if (found := text.count(bug.old)) != 1:
        raise SystemExit(f"{bug.name}: {bug.file} holds {found} times, not once: {bug.old}")
    return path, text.replace(bug.old, bug.new)


def run_tests(tree: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The fast ones of these tests in the copy, whose pyproject.toml puts its own src first."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tree / "src"), str(tree)])
    return subprocess.run(
        [*command, *tests], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def main() -> None:
    """Patches, runs, tells."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("src", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "mutations")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        # 1. Every bug applies, and without any the tests pass.
        for bug in BUGS:
            patched(bug, tree)
        began = time.monotonic()
        result = run_tests(tree, tuple(dict.fromkeys(test for bug in BUGS for test in bug.tests)))
        if result.returncode:
            raise SystemExit(f"the tests fail without any bug:\n{result.stdout}{result.stderr}")
        print(f"no bug: passed in {time.monotonic() - began:.0f} s", flush=True)
        # 2. With any one bug they fail.
        missed = []
        for bug in BUGS:
            path, text = patched(bug, tree)
            right = path.read_text(encoding="utf-8")
            path.write_text(text, encoding="utf-8")
            began = time.monotonic()
            result = run_tests(tree, bug.tests)
            path.write_text(right, encoding="utf-8")
            caught = re.findall(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
            if result.returncode != FAILED or not caught:
                missed.append(bug.name)
                print(result.stdout + result.stderr)
            told = f"caught by {caught[0]}" if caught else "NOT CAUGHT"
            print(f"{bug.name}: {told} in {time.monotonic() - began:.0f} s", flush=True)
        if missed:
            raise SystemExit(f"not caught: {', '.join(missed)}")


if __name__ == "__main__":
    main()
