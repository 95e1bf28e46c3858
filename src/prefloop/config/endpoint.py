"""Settings of a judge that is a language model behind an OpenAI-compatible endpoint. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from prefloop.config.ranges import Above, Settings, TemplateArgs, endpoint_parts, is_endpoint
from prefloop.config.resolve import flag

JudgeMode = Literal["pairwise", "rubric"]


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(Settings):
    """How an LLM judge is asked (see docs/judges.md)."""

    judge_prompt: Path | None = None
    """LLM judge: file of the prompt it is asked with; by default prefloop's own."""
    judge_args: TemplateArgs = '{"temperature": 0}'
    """LLM judge: JSON mapping sent with each request, such as '{"max_tokens": 512}'."""
    judge_concurrency: Annotated[int, Above(0)] = 8
    """LLM judge: requests under way at once."""
    judge_timeout: Annotated[float, Above(0)] = 120.0
    """LLM judge: seconds until a request without a reply is tried again."""
    judge_cache: Path | None = None
    """LLM judge: folder that keeps its replies; by default `judge` in prefloop's cache."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        given = {n: getattr(self, n) for n in ("judge", "monitor") if hasattr(self, n)}
        asked = {name: judge for name, judge in given.items() if judge and is_endpoint(judge)}
        for name, judge in asked.items():
            yield from endpoint_problems(judge, flag(name))
        if asked:
            return
        none = " and ".join(f"{flag(name)} is {judge}" for name, judge in given.items())
        for field in fields(self):
            if field.name.startswith("judge_") and getattr(self, field.name) != field.default:
                yield (
                    f"{flag(field.name)} is read by an LLM judge, and {none}; give "
                    "openai:MODEL@URL, or leave it out"
                )


def endpoint_problems(judge: str, of: str = "--judge") -> Iterator[str]:
    """What is wrong with `openai:MODEL@URL`, given as the flag `of`."""
    model, url = endpoint_parts(judge)
    if not model or not url:
        yield f"{of} {judge}: give openai:MODEL@URL, as openai:my-model@http://127.0.0.1:8000/v1"
    elif re.search(r"[?#]|//[^/]*@", url):
        yield (
            f"{of}: its URL holds a name, a query or a fragment, which would be written into "
            "records; give the bare URL, and the key in PREFLOOP_JUDGE_API_KEY"
        )
