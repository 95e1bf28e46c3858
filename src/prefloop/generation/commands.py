"""What `prefloop sample`, `generate` and `chat` do: prompts in, answers out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from prefloop import sources
from prefloop.config import ChatConfig, GenerateConfig, PolicyConfig, SampleConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.data import split
from prefloop.data.columns import carried, like_answers, of_answers
from prefloop.data.formats import as_chat
from prefloop.data.tokenize import decode_answer, stop_token_ids, tokenize
from prefloop.errors import UserError
from prefloop.files import check_writable, write_jsonl
from prefloop.generation.engine import Engine, in_process
from prefloop.generation.protocol import MakeEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.load import load_policy, pick_device
from prefloop.models.model import LoadedModel
from prefloop.models.weights import storage_of
from prefloop.progress import Progress
from prefloop.provenance import weights_sha256
from prefloop.records import Message, Prompt, RowCounts, text_to_json
from prefloop.runs import model_path
from prefloop.terminal import shown


def sample(config: SampleConfig, make_engine: MakeEngine = in_process) -> Path:
    """Writes n answers to each prompt into --output, one row a prompt, ready to be ranked.

    Of a labelling store, the prompts that have no answers yet.
    """
    validate(config)
    _check_output(config.output)
    counts = RowCounts()
    prompts = sources.load_unanswered(config.data, counts, config.chat)
    _check_carried(prompts)
    model = _loaded(config)
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


def generate(config: GenerateConfig, make_engine: MakeEngine = in_process) -> Path | None:
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
    model = _loaded(config)
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


def chat(config: ChatConfig, source: TextIO | None = None, out: TextIO | None = None) -> None:
    """Answers line by line, each with the conversation so far, until the input ends.

    A conversation that outgrows --max-length loses its oldest turns, and says so.
    """
    validate(config)
    source, out = source or sys.stdin, out or sys.stdout
    model = _loaded(config)
    if not model.tokenizer.chat_template:
        raise UserError(
            f"{config.model}: its tokenizer has no chat template; use `prefloop generate`, or a "
            "model tuned on chats"
        )
    engine, sampling = Engine(model, 1), _sampling(config, model)
    system = [Message("system", config.system)] if config.system is not None else []
    history: list[Message] = []
    for turn, line in enumerate(_lines(source, out)):
        history.append(Message("user", line))
        ids = model.encoder.prompt((*system, *history))
        while history and len(ids) > _room(config):
            print(f"({len(ids)} tokens, {_room(config)} fit: the oldest turn is cut)", file=out)
            del history[:2]
            ids = model.encoder.prompt((*system, *history)) if history else []
        if history:
            drawn = _print_answer(engine, ids, sampling, config.seed + turn, out)
            text = model.encoder.said(tuple(history), drawn)
            history.append(Message("assistant", text))


def _print_answer(
    engine: Engine, ids: list[int], sampling: Sampling, seed: int, out: TextIO
) -> list[int]:
    """An answer's tokens, printed as they come but for bytes of half a character."""
    drawn: list[int] = []
    before = ""

    def show(tokens: Tensor, end: str = "") -> None:
        nonlocal before
        drawn.extend(tokens.tolist())
        text = decode_answer(engine.model.tokenizer, drawn)
        if end or not text.endswith("\ufffd"):
            print(shown(text[len(before) :]), end=end, file=out, flush=True)
            before = text

    engine.generate([ids], 1, sampling, seed, on_tokens=show)
    show(torch.tensor([], dtype=torch.long), end="\n")
    return drawn


def _lines(source: TextIO, out: TextIO) -> Iterator[str]:
    """The user's lines but for empty ones, asked for on a terminal."""
    while True:
        if source.isatty():
            print("> ", end="", file=out, flush=True)
        if not (line := source.readline()):
            return
        try:
            line.encode()
        except UnicodeEncodeError:
            print("(not UTF-8: this line is left out)", file=out)
            continue
        if line.strip():
            yield line.strip()


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
    examples = tokenize(prompts, model.encoder, _room(config), config.truncation, counts)
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
            _sampling(config, model),
            config.seed,
            on_done=lambda _: progress.advance(),
        )
    return [(prompts[e.record], row) for e, row in zip(examples, samples, strict=True)]


def _loaded(config: PolicyConfig) -> LoadedModel:
    arguments = template_arguments(config.template_args)
    return load_policy(
        config.model, pick_device(config.device), storage_of(config), template_args=arguments
    )


def _room(config: PolicyConfig) -> int:
    """Most tokens of a prompt."""
    return config.max_length - config.max_new_tokens


def _sampling(config: PolicyConfig, model: LoadedModel) -> Sampling:
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
