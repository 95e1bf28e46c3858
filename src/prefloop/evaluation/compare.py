"""`prefloop compare`: models against the SFT model on the same held-out prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prefloop import sources
from prefloop.config import CompareConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import is_endpoint, template_arguments
from prefloop.config.resolve import as_dict
from prefloop.data import split
from prefloop.data.tokenize import Example, same_ids, stop_token_ids, tokenize
from prefloop.errors import UserError
from prefloop.evaluation.comparison import Comparison, WholeCost, read_run
from prefloop.evaluation.lineage import checkpoints, mean_cost, whole_cost
from prefloop.evaluation.measure import (
    Answered,
    ByPrompt,
    Judged,
    calibration_of,
    frontier,
    judged_prompts,
    measured,
    scored,
)
from prefloop.evaluation.pairs import all_pairs
from prefloop.evaluation.report import render
from prefloop.evaluation.sentences import sentences
from prefloop.evaluation.verdicts import gold_scores
from prefloop.files import check_folder, write_atomic, write_jsonl
from prefloop.generation.protocol import MakeEngine
from prefloop.generation.remote import engine_for
from prefloop.generation.sampler import Sampling
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import is_scorer_folder, load_policy, pick_device
from prefloop.models.model import LoadedModel
from prefloop.models.weights import storage_of
from prefloop.progress import Progress
from prefloop.records import Prompt, RowCounts, text_to_json
from prefloop.rewards.functions import columns_of
from prefloop.rewards.health import copied_share
from prefloop.rewards.judges import Judge, load_judge
from prefloop.rewards.llm import Answer, PairwiseJudge, pairwise_judge

SCORING_TOKENS = 8192  # in one forward pass


@dataclass(frozen=True)
class Task:
    """What every model is asked, and who judges."""

    config: CompareConfig
    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    sft: LoadedModel
    judge: Judge | PairwiseJudge
    proxy: Judge | None
    make_engine: MakeEngine
    baseline: Sequence[Sequence[Answer]] | None = None  # SFT's answers, once they are there


def compare(
    config: CompareConfig, notes: tuple[str, ...] = (), make_engine: MakeEngine = engine_for
) -> Comparison:
    """Sample, judge and measure; writes report.html (with `notes`), compare.json, answers.jsonl."""
    # 1. Prompts, judges and the SFT model, which stays loaded as the reference of the KL.
    validate(config)
    check_folder(config.output)
    named = named_models(config.models)
    for path in (config.sft, *(path for paths in named.values() for path in paths)):
        is_scorer_folder(path)  # a folder that is none is told before the work
    task = prepare(config, make_engine)
    # 2. SFT's answers, and more of them for best-of-n to choose from.
    pool_size = config.best_of if task.proxy and config.best_of > 1 else 0
    everything, sft_seconds = _sample(task, task.sft, config.samples_per_prompt + pool_size, "SFT")
    baseline = [row[: config.samples_per_prompt] for row in everything]
    pool = [row[config.samples_per_prompt :] for row in everything]
    task = replace(task, baseline=[[Answer(a.text, not a.truncated) for a in r] for r in baseline])
    answered = [Answered("SFT", (config.sft,), (baseline,), sft_seconds)]
    # 3. Best-of-n.
    if pool_size:
        best = [[max(row, key=lambda a: a.proxy or 0.0)] for row in pool]
        seconds, name = sft_seconds * pool_size, f"best-of-{pool_size}"
        answered.append(Answered(name, (), (best,), seconds, pool_size))
    # 4. The other models, one at a time.
    for name, paths in named.items():
        runs = [_run_of(task, name, path) for path in paths]
        seconds = sum(seconds for _, seconds in runs) / len(runs)
        answered.append(Answered(name, paths, tuple(answers for answers, _ in runs), seconds))
    # 5. Numbers, and what they say.
    return conclude(task, answered, notes, frontier(pool, config.seed) if pool_size else ())


def conclude(
    task: Task,
    answered: Sequence[Answered],
    notes: tuple[str, ...],
    best: tuple[tuple[int, float, float], ...] = (),
) -> Comparison:
    """The numbers of judged answers, and what they say, written to the output."""
    result = _compared(task, answered, notes, best)
    _write(task.config.output, result, task.prompts, answered)
    return result


def _compared(
    task: Task,
    answered: Sequence[Answered],
    notes: tuple[str, ...],
    best: tuple[tuple[int, float, float], ...],
) -> Comparison:
    config, sft = task.config, answered[0]
    prompts = judged_prompts(answered)
    if not prompts:
        raise UserError(f"{config.judge}: no prompt got scores for all ways; give another judge")
    unjudged = sum(a.gold is None for w in answered for run in w.runs for row in run for a in row)
    if unjudged:
        left_out = len(task.prompts) - len(prompts)
        notes += (
            f"{unjudged} answers got no score from the judge; {left_out} prompts, which "
            "have none from some way, are left out of its numbers for all ways.",
        )
    first = measured(sft, sft, None, prompts, config.seed)
    ways = [first]
    ways += [measured(way, sft, first.vitals, prompts, config.seed) for way in answered[1:]]
    verdicts = all_pairs([scored(way, prompts) for way in answered], config.seed)
    costs = [_cost(way, config) for way in answered]
    whole_costs = tuple(cost for cost in costs if cost)
    reward_run = read_run(Path(config.reward_model)) if config.reward_model else None
    return Comparison(
        ways=tuple(ways),
        prompts=len(task.prompts),
        frontier=best,
        reward_run=reward_run,
        settings={key: value for key, value in as_dict(config).items() if value is not None},
        notes=notes,
        verdicts=verdicts,
        sentences=sentences(ways, verdicts, whole_costs),
        whole_costs=whole_costs,
        checkpoints=tuple(
            point
            for way in ways
            for number, one in enumerate(way.runs or (way,), 1)
            if one.run
            for point in checkpoints(way.name, one.run, number)
        ),
        calibration=calibration_of(answered, reward_run, config.agreement),
        unjudged=unjudged,
    )


def _cost(way: Answered, config: CompareConfig) -> WholeCost | None:
    """Of best-of-n, what led to the two models that it needs; of several runs, their mean."""
    if way.n > 1:
        return whole_cost(way.name, (config.sft, config.reward_model or ""))
    costs = [whole_cost(way.name, (path,)) for path in way.paths]
    known = [cost for cost in costs if cost]
    return mean_cost(known) if known and len(known) == len(costs) else None


def named_models(models: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The paths of `name=path` items by name: several are runs of one way."""
    named: dict[str, tuple[str, ...]] = {}
    for name, _, path in (item.partition("=") for item in models):
        named[name] = (*named.get(name, ()), path)
    return named


def _run_of(task: Task, name: str, path: str) -> tuple[ByPrompt, float]:
    """A model's answers, and the CPU seconds that one took; the model is let go."""
    arguments, storage = task.sft.template_args, storage_of(task.config)
    model = load_policy(path, task.sft.device, storage, template_args=arguments)
    _require_same_tokens(task.sft, model)
    return _sample(task, model, task.config.samples_per_prompt, name)


def prepare(config: CompareConfig, make_engine: MakeEngine) -> Task:
    """The prompts, the judges and the SFT model."""
    arguments = template_arguments(config.template_args)
    judge: Judge | PairwiseJudge
    if is_endpoint(config.judge) and config.judge_mode == "pairwise":
        judge = pairwise_judge(config.judge, config)
    else:
        judge = _scorer(config, config.judge)
    proxy = _scorer(config, config.reward_model) if config.reward_model else None
    sft = load_policy(
        config.sft, pick_device(config.device), storage_of(config), template_args=arguments
    )
    records = sources.load(config.data, "prompt", counts := RowCounts(), config.chat)
    records = split.first_prompts(records, config.max_prompts, counts)
    room = config.max_length - config.max_new_tokens
    examples = tokenize(records, sft.encoder, room, config.truncation, counts)
    print(counts.summary(), file=sys.stderr)
    for example in examples:
        sft.check_example(example, config.max_new_tokens)
    prompts = [records[example.record] for example in examples]
    for one in (judge, proxy):
        if one is not None and not isinstance(one, PairwiseJudge):
            one.require(prompts)
    has_template = bool(sft.tokenizer.chat_template)
    if note := sources.strings_note(records, has_template, arguments, config.sft):
        print(note, file=sys.stderr)
    prompt_ids = [list(example.prompt) for example in examples]
    return Task(config, prompts, prompt_ids, sft, judge, proxy, make_engine)


def _scorer(config: CompareConfig, source: str) -> Judge:
    return load_judge(
        source,
        device=config.device,
        dtype=config.dtype,
        weights=config.weights,
        max_length=config.max_length,
        template_args=template_arguments(config.template_args),
        endpoint=config if source == config.judge else None,
    )


def _require_same_tokens(sft: LoadedModel, model: LoadedModel) -> None:
    if not same_ids(sft.tokenizer, model.tokenizer):
        raise UserError(
            f"{model.source}: its tokenizer is not that of {sft.source}, so there is no KL "
            "between them; compare models trained from the same SFT model"
        )


def _sample(task: Task, model: LoadedModel, n: int, name: str) -> tuple[ByPrompt, float]:
    """n judged answers to each prompt, and the CPU seconds that sampling one took."""
    config = task.config
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_token_ids=stop_token_ids(model.tokenizer, model.hf.generation_config),
    )
    began = time.process_time()
    engine = task.make_engine(config, model)
    with Progress(f"{name}: answers", n * len(task.prompts), leave=False) as progress:
        samples = engine.generate(
            task.prompt_ids, n, sampling, config.seed, on_done=lambda _: progress.advance()
        )
    seconds = (time.process_time() - began) / (n * len(samples))
    flat = [
        (prompt, sample)
        for prompt, row in zip(task.prompts, samples, strict=True)
        for sample in row
    ]
    rows = [row for row, _ in flat]
    prompts = [row.prompt for row in rows]
    texts = [model.encoder.said(row.prompt, sample.tokens) for row, sample in flat]
    ended = [sample.finish_reason == "stop" for _, sample in flat]
    answers = list(map(Answer, texts, ended))
    with Progress(f"{name}: judged", 3 * len(flat), leave=False) as progress:
        gold = gold_scores(task.judge, rows, answers, _against(task, answers, n))
        progress.advance(len(flat))
        proxy: Sequence[float | None] = [None] * len(texts)
        if task.proxy:
            proxy = task.proxy(prompts, texts, ended, columns_of([row.extra for row in rows]))
        progress.advance(len(flat))
        kl = _log_ratios(task, model, [[sample.tokens for sample in row] for row in samples])
    copied = [
        copied_share(sample.tokens, prompt)
        for prompt, row in zip(task.prompt_ids, samples, strict=True)
        for sample in row
    ]
    judged = iter(
        Judged(text, s.tokens, c, s.finish_reason == "length", q, g, r)
        for text, (_, s), c, q, g, r in zip(texts, flat, copied, kl, gold, proxy, strict=True)
    )
    return [[next(judged) for _ in row] for row in samples], seconds


def _against(task: Task, answers: Sequence[Answer], n: int) -> list[Sequence[Answer]]:
    """What each answer is compared with: SFT's to its prompt, and those of SFT with themselves."""
    count = task.config.samples_per_prompt
    if task.baseline is not None:
        return [task.baseline[i // n] for i in range(len(answers))]
    first = [answers[i - i % n : i - i % n + count] for i in range(len(answers))]
    return [first[i] if i % n >= count else [answers[i]] for i in range(len(answers))]


def _log_ratios(
    task: Task, model: LoadedModel, answers: Sequence[Sequence[tuple[int, ...]]]
) -> list[float]:
    """log pi(y|x) - log pi_sft(y|x) of every answer, in order: 0 for SFT's own."""
    if model is task.sft:
        return [0.0 for row in answers for _ in row]
    own, reference = (_log_probs(task, each, answers) for each in (model, task.sft))
    return [p - q for p, q in zip(own, reference, strict=True)]


def _log_probs(
    task: Task, model: LoadedModel, answers: Sequence[Sequence[tuple[int, ...]]]
) -> list[float]:
    """log pi(y|x) of every answer at the sampling temperature (1 where it is greedy), in order."""
    config = task.config
    examples = [
        Example(
            prompt=tuple(prompt),
            answers=tuple(row),
            answer_masks=tuple((True,) * len(answer) for answer in row),
            index=index,
            where=f"prompt {index}",
        )
        for index, (prompt, row) in enumerate(zip(task.prompt_ids, answers, strict=True))
    ]
    temperature = config.temperature or 1.0
    sums = sequence_log_probs(model, examples, SCORING_TOKENS, temperature)
    return sums.tolist()


def _write(
    output: Path, result: Comparison, prompts: list[Prompt], answered: Sequence[Answered]
) -> None:
    """answers.jsonl has one line a prompt, way and run; compare.json every number of the page."""
    rows = [
        {
            "prompt": text_to_json(asked.prompt),
            "way": way.name,
            **({"run": number} if len(way.runs) > 1 else {}),
            "completions": [answer.text for answer in row],
            "tokens": [answer.tokens for answer in row],
            "judge": [answer.gold for answer in row],
            "reward_model": [answer.proxy for answer in row],
            "kl": [answer.kl for answer in row],
            "truncated": [answer.truncated for answer in row],
        }
        for way in answered
        for number, by_prompt in enumerate(way.runs, 1)
        for asked, row in zip(prompts, by_prompt, strict=True)
    ]
    write_jsonl(output / "answers.jsonl", rows)
    numbers = asdict(result)
    for way in numbers["ways"]:
        for one in (way, *way["runs"]):
            if one["run"]:
                one["run"].pop("metrics")
    if numbers["reward_run"]:
        numbers["reward_run"].pop("metrics")
    write_atomic(output / "compare.json", json.dumps(numbers, indent=2) + "\n")
    write_atomic(output / "report.html", render(result, rows))
