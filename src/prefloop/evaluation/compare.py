"""`prefloop compare`: models against the SFT model on the same held-out prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prefloop import sources
from prefloop.config import CompareConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.config.resolve import as_dict
from prefloop.data import split
from prefloop.data.tokenize import Example, same_ids, stop_token_ids, tokenize
from prefloop.errors import UserError
from prefloop.evaluation.comparison import Comparison, Way, read_run
from prefloop.evaluation.frontier import best_of_n, best_of_n_kl
from prefloop.evaluation.report import render
from prefloop.evaluation.winrate import win_rate
from prefloop.files import check_folder, write_atomic, write_jsonl
from prefloop.generation.engine import in_process
from prefloop.generation.protocol import MakeEngine
from prefloop.generation.sampler import Sampling
from prefloop.intervals import Interval, mean_score
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import is_scorer_folder, load_policy, pick_device
from prefloop.models.model import LoadedModel
from prefloop.models.weights import storage_of
from prefloop.progress import Progress
from prefloop.records import Prompt, RowCounts, Text, text_to_json
from prefloop.rewards.functions import columns_of
from prefloop.rewards.health import Vitals, distinct_n, repeated_share, signs
from prefloop.rewards.judges import Judge, load_judge

EXAMPLES = 12  # prompts whose answers the page shows
SCORING_TOKENS = 8192  # in one forward pass


@dataclass(frozen=True)
class Judged:
    """A model's answer to a prompt, judged."""

    text: str
    tokens: tuple[int, ...]  # with the stop token that ended it
    truncated: bool
    kl: float  # log pi(y|x) - log pi_sft(y|x), nats
    gold: float
    proxy: float | None


ByPrompt = list[list[Judged]]
"""By prompt, then by sample."""


@dataclass(frozen=True)
class Task:
    """What every model is asked, and who judges."""

    config: CompareConfig
    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    sft: LoadedModel
    judge: Judge
    proxy: Judge | None
    make_engine: MakeEngine


def compare(
    config: CompareConfig, notes: tuple[str, ...] = (), make_engine: MakeEngine = in_process
) -> Comparison:
    """Sample, judge and measure; writes report.html (with `notes`), compare.json, answers.jsonl."""
    # 1. Prompts, judges and the SFT model, which stays loaded as the reference of the KL.
    validate(config)
    check_folder(config.output)
    named = _named_models(config.models)
    for path in (config.sft, *named.values()):
        is_scorer_folder(path)  # a folder that is none is told before the work
    task = _prepare(config, make_engine)
    # 2. SFT's answers, and more of them for best-of-n to choose from.
    pool_size = config.best_of if task.proxy and config.best_of > 1 else 0
    everything, sft_seconds = _sample(task, task.sft, config.samples_per_prompt + pool_size, "SFT")
    baseline = [row[: config.samples_per_prompt] for row in everything]
    pool = [row[config.samples_per_prompt :] for row in everything]
    answers = {"SFT": baseline}
    ways = [_way("SFT", Path(config.sft), baseline, baseline, None, sft_seconds, config.seed)]
    sft = ways[0].vitals
    # 3. Best-of-n.
    frontier: tuple[tuple[int, float, float], ...] = ()
    if pool_size:
        name = f"best-of-{pool_size}"
        answers[name] = [[max(row, key=lambda a: a.proxy or 0.0)] for row in pool]
        way = _way(name, None, answers[name], baseline, sft, sft_seconds * pool_size, config.seed)
        ways.append(_with_bound(way, pool_size))
        frontier = _frontier(pool, config.seed)
    # 4. The other models, one at a time.
    for name, path in named.items():
        model = load_policy(
            path, task.sft.device, storage_of(config), template_args=task.sft.template_args
        )
        _require_same_tokens(task.sft, model)
        answers[name], seconds = _sample(task, model, config.samples_per_prompt, name)
        del model
        ways.append(_way(name, Path(path), answers[name], baseline, sft, seconds, config.seed))
    # 5. Report.
    result = Comparison(
        ways=tuple(ways),
        prompts=len(task.prompts),
        example_prompts=tuple(_shown(row.prompt) for row in task.prompts[:EXAMPLES]),
        frontier=frontier,
        reward_run=read_run(Path(config.reward_model)) if config.reward_model else None,
        settings={key: value for key, value in as_dict(config).items() if value is not None},
        notes=notes,
    )
    _write(config.output, result, task.prompts, answers)
    return result


def _named_models(models: Sequence[str]) -> dict[str, str]:
    """`name=path` items by name."""
    return {name: path for name, _, path in (item.partition("=") for item in models)}


def _prepare(config: CompareConfig, make_engine: MakeEngine) -> Task:
    arguments = template_arguments(config.template_args)
    judge, proxy = (
        load_judge(
            source,
            device=config.device,
            dtype=config.dtype,
            weights=config.weights,
            max_length=config.max_length,
            template_args=arguments,
            endpoint=config if source == config.judge else None,
        )
        if source
        else None
        for source in (config.judge, config.reward_model)
    )
    assert judge is not None
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
    for one in (judge, proxy) if proxy else (judge,):
        one.require(prompts)
    has_template = bool(sft.tokenizer.chat_template)
    if note := sources.strings_note(records, has_template, arguments, config.sft):
        print(note, file=sys.stderr)
    prompt_ids = [list(example.prompt) for example in examples]
    return Task(config, prompts, prompt_ids, sft, judge, proxy, make_engine)


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
    prompts = [row.prompt for row, _ in flat]
    texts = [model.encoder.said(row.prompt, sample.tokens) for row, sample in flat]
    columns = columns_of([row.extra for row, _ in flat])
    ended = [sample.finish_reason == "stop" for _, sample in flat]
    with Progress(f"{name}: judged", 3 * len(flat), leave=False) as progress:
        gold = task.judge(prompts, texts, ended, columns)
        progress.advance(len(flat))
        proxy = task.proxy(prompts, texts, ended, columns) if task.proxy else [None] * len(texts)
        progress.advance(len(flat))
        kl = _log_ratios(task, model, [[sample.tokens for sample in row] for row in samples])
    judged = iter(
        Judged(text, s.tokens, s.finish_reason == "length", q, g, r)
        for text, (_, s), q, g, r in zip(texts, flat, kl, gold, proxy, strict=True)
    )
    return [[next(judged) for _ in row] for row in samples], seconds


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


def _way(
    name: str,
    path: Path | None,
    answers: ByPrompt,
    baseline: ByPrompt,
    sft: Vitals | None,
    seconds: float,
    seed: int,
) -> Way:
    """Measure one way; `sft` is None for SFT itself."""
    first = [row[0] for row in answers]
    flat = [answer for row in answers for answer in row]
    gold = [[answer.gold for answer in row] for row in answers]
    proxy = [[a.proxy for a in row if a.proxy is not None] for row in answers]
    vitals = Vitals(
        gold=mean_score(gold, seed),
        proxy=mean_score(proxy, seed) if all(proxy) else None,
        kl=mean_score([[answer.kl for answer in row] for row in answers], seed),
        length=_mean(len(answer.tokens) for answer in flat),
        truncated=_mean(answer.truncated for answer in flat),
        distinct_2=distinct_n([answer.tokens for answer in first]),
        repeated=_mean(repeated_share(answer.tokens) for answer in flat),
    )
    against = [[answer.gold for answer in row] for row in baseline]
    return Way(
        name=name,
        vitals=vitals,
        win_rate=win_rate(gold, against, seed) if sft else None,
        kl_is_bound=False,
        signs=tuple(signs(vitals, sft)) if sft else (),
        cpu_seconds_per_answer=seconds,
        run=read_run(path) if path else None,
        examples=tuple(answer.text for answer in first[:EXAMPLES]),
        example_scores=tuple(answer.gold for answer in first[:EXAMPLES]),
    )


def _with_bound(way: Way, n: int) -> Way:
    """Best-of-n's KL cannot be estimated from its answers; it has a bound instead."""
    bound = best_of_n_kl(n)
    vitals = replace(way.vitals, kl=Interval(bound, bound, bound))
    return replace(way, vitals=vitals, kl_is_bound=True)


def _frontier(pool: ByPrompt, seed: int) -> tuple[tuple[int, float, float], ...]:
    gold = [[answer.gold for answer in row] for row in pool]
    proxy = [[answer.proxy or 0.0 for answer in row] for row in pool]
    sizes = range(1, len(pool[0]) + 1)
    return tuple((n, best_of_n_kl(n), best_of_n(gold, proxy, n, seed).mean) for n in sizes)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _shown(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def _write(
    output: Path, result: Comparison, prompts: list[Prompt], answers: dict[str, ByPrompt]
) -> None:
    """answers.jsonl has one line a prompt and way; compare.json every number of the table."""
    rows = [
        {
            "prompt": text_to_json(asked.prompt),
            "way": name,
            "completions": [answer.text for answer in row],
            "tokens": [answer.tokens for answer in row],
            "judge": [answer.gold for answer in row],
            "reward_model": [answer.proxy for answer in row],
            "kl": [answer.kl for answer in row],
            "truncated": [answer.truncated for answer in row],
        }
        for name, by_prompt in answers.items()
        for asked, row in zip(prompts, by_prompt, strict=True)
    ]
    write_jsonl(output / "answers.jsonl", rows)
    numbers = asdict(result)
    for way in numbers["ways"]:
        way.pop("examples")
        way.pop("example_scores")
        if way["run"]:
            way["run"].pop("metrics")
    numbers.pop("example_prompts")
    if numbers["reward_run"]:
        numbers["reward_run"].pop("metrics")
    write_atomic(output / "compare.json", json.dumps(numbers, indent=2) + "\n")
    write_atomic(output / "report.html", render(result))
