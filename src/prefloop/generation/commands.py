"""What `prefloop sample` and `generate` do: prompts in, answers out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from prefloop import sources
from prefloop.config import GenerateConfig, PolicyConfig, SampleConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.data import split
from prefloop.data.columns import carried, like_answers, of_answers
from prefloop.data.formats import as_chat
from prefloop.data.tokenize import stop_token_ids, tokenize
from prefloop.errors import UserError
from prefloop.files import check_writable, write_jsonl
from prefloop.generation.protocol import MakeEngine, Sample
from prefloop.generation.remote import engine_for
from prefloop.generation.sampler import Sampling
from prefloop.models.load import load_policy, pick_device
from prefloop.models.model import LoadedModel
from prefloop.models.weights import storage_of
from prefloop.progress import Progress
from prefloop.provenance import weights_sha256
from prefloop.records import Prompt, RowCounts, text_to_json
from prefloop.runs import model_path
from prefloop.terminal import shown


def sample(config: SampleConfig, make_engine: MakeEngine = engine_for) -> Path:
    """Writes n answers to each prompt into --output, one row a prompt, ready to be ranked.

    Of a labelling store, the prompts that have no answers yet.
    """
    validate(config)
    _check_output(config.output)
    counts = RowCounts()
    prompts = sources.load_unanswered(config.data, counts, config.chat)
    _check_carried(prompts)
    model = loaded(config)
    answered = _answers(config, model, prompts, config.samples_per_prompt, counts, make_engine)
    settings = {k: getattr(config, k) for k in ("temperature", "top_p", "top_k", "max_new_tokens")}
    weights = weights_sha256(Path(model_path(config.model)))
    encoder = model.encoder
    rows = [
        _carried(prompt)
        | {
            "completions": [encoder.said(prompt.prompt, s.tokens) for s in samples],
            "completion_ids": [list(s.tokens) for s in samples],
            "tokenizer": encoder.fingerprint,
            "finish_reasons": [s.finish_reason for s in samples],
            "log_probs": [sum(s.log_probs) for s in samples],
            "model": config.model,
            "weights": weights,
            "seed": config.seed,
            "sampling": settings,
        }
        for prompt, samples in answered
    ]
    write_jsonl(config.output, rows)
    print(counts.summary(), file=sys.stderr)
    return config.output


def generate(config: GenerateConfig, make_engine: MakeEngine = engine_for) -> Path | None:
    """Prints an answer to each prompt, or writes them into --output."""
    validate(config)
    if config.output is not None:
        _check_output(config.output)
    counts = RowCounts(read=len(config.prompt))
    for number, text in enumerate(config.prompt, 1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt {number}: not UTF-8; mend its encoding") from None
    prompts = [Prompt(text, f"--prompt {number}") for number, text in enumerate(config.prompt, 1)]
    if config.chat:
        prompts = [as_chat(prompt) for prompt in prompts]
    if config.data is not None:
        prompts = sources.load(config.data, "prompt", counts, config.chat)
    _check_carried(prompts)
    model = loaded(config)
    answered = _answers(config, model, prompts, 1, counts, make_engine)
    encoder = model.encoder
    if config.output is not None:
        rows = [
            _carried(prompt)
            | {
                "completion": encoder.said(prompt.prompt, one.tokens),
                "completion_ids": list(one.tokens),
                "tokenizer": encoder.fingerprint,
                "completion_finish_reason": one.finish_reason,
            }
            for prompt, (one,) in answered
        ]
        write_jsonl(config.output, rows)
    else:
        texts = [encoder.said(prompt.prompt, one.tokens) for prompt, (one,) in answered]
        print("\n\n".join(map(shown, texts)))
    print(counts.summary(), file=sys.stderr)
    return config.output


def _answers(
    config: SampleConfig | GenerateConfig,
    model: LoadedModel,
    prompts: Sequence[Prompt],
    n: int,
    counts: RowCounts,
    make_engine: MakeEngine,
) -> list[tuple[Prompt, list[Sample]]]:
    """Each prompt that fits with its n samples, with its progress told."""
    prompts = split.first_prompts(prompts, config.max_prompts, counts)
    examples = tokenize(prompts, model.encoder, room(config), config.truncation, counts)
    for example in examples:
        model.check_example(example, config.max_new_tokens)
    arguments = model.template_args
    has_template = bool(model.tokenizer.chat_template)
    if note := sources.strings_note(prompts, has_template, arguments, config.model):
        print(note, file=sys.stderr)
    engine = make_engine(config, model)
    with Progress("answers", n * len(examples), leave=False) as progress:
        samples = engine.generate(
            [example.prompt for example in examples],
            n,
            sampling_of(config, model),
            config.seed,
            on_done=lambda _: progress.advance(),
        )
    return [(prompts[e.record], row) for e, row in zip(examples, samples, strict=True)]


def loaded(config: PolicyConfig, path: str = "") -> LoadedModel:
    """The model of the settings, or another one with the same settings."""
    arguments = template_arguments(config.template_args)
    return load_policy(
        path or config.model,
        pick_device(config.device),
        storage_of(config),
        template_args=arguments,
    )


def room(config: PolicyConfig) -> int:
    """Most tokens of a prompt."""
    return config.max_length - config.max_new_tokens


def sampling_of(config: PolicyConfig, model: LoadedModel) -> Sampling:
    """How the settings draw answers."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=stop_token_ids(model.tokenizer, model.hf.generation_config),
    )


def _carried(prompt: Prompt) -> dict[str, object]:
    """The row with its prompt, without what speaks of former answers."""
    return {"prompt": text_to_json(prompt.prompt), **carried(prompt.extra, prompt.where)}


def _check_carried(prompts: Sequence[Prompt]) -> None:
    """Before the first answer: the output's rows can be written; what they will lack is told."""
    gone: dict[str, int] = {}
    kept: dict[str, int] = {}
    for prompt in prompts:
        carried(prompt.extra, prompt.where)
        for name in prompt.extra:
            for counts, of in ((gone, of_answers), (kept, like_answers)):
                if of(name):
                    counts[name] = counts.get(name, 0) + 1
    headings = (
        "columns of former answers, not carried along",
        "columns carried along, answers by name",
    )
    for what, counts in zip(headings, (gone, kept), strict=True):
        if counts:
            listed = ", ".join(f"{shown(name)} ({rows} rows)" for name, rows in counts.items())
            print(f"{what}: {listed}", file=sys.stderr)


def _check_output(path: Path) -> None:
    """Before the work, not after it."""
    if path.is_dir() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--output {path}: give the name of a .jsonl or .jsonl.gz file")
    check_writable(path)
