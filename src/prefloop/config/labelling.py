"""Settings of `prefloop label ...`, of the people who rank and of their store. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from prefloop.config.ranges import (
    Above,
    Device,
    DType,
    OnlyWith,
    Seed,
    Settings,
    TemplateArgs,
    Weights,
    Within,
    unread_by_functions,
)

Mode = Literal["ranking", "pairwise", "rating"]
Strategy = Literal["random", "uncertainty", "gap"]
Consensus = Literal["labeller", "majority", "dawid-skene"]
Form = Literal["rankings", "dpo", "hh", "kto", "audit"]

DECIDED = OnlyWith("form", "rankings", "dpo", "hh", "kto")  # audit writes all that was said


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Settings):
    """What all `label` commands share."""

    store: str
    """SQLite file, or a database URL (postgresql+psycopg://USER@HOST/NAME)."""


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(StoreConfig):
    """What the commands about one project share."""

    project: str = "main"
    """Name of the project: tasks with one mode and one set of guidelines."""


@dataclass(frozen=True, kw_only=True)
class LabelServeConfig(StoreConfig):
    """Serve the page on which people rank answers."""

    host: str = "127.0.0.1"
    """Address to listen on; other machines reach it only if this says so."""
    port: Annotated[int, Within(1, 65535)] = 8000
    """Port to listen on."""
    public_url: str | None = None
    """What the browser's address bar shows, behind a proxy (https://labels.example.org)."""
    session_hours: Annotated[float, Above(0)] = 24.0
    """Hours after which a labeller must open the personal link again."""


@dataclass(frozen=True, kw_only=True)
class LabelImportConfig(ProjectConfig):
    """Put prompts with answers into a project, to be ranked or already ranked."""

    data: str
    """Rows of `prefloop sample`, rankings or pairs; an Argilla or Label Studio export; a folder or
    hub id that `datasets` reads; another store's rankings, as DB#PROJECT; or the folder that
    `prefloop compare` wrote, whose answers people then judge, blind."""
    samples: Annotated[int, Above(0)] = 1
    """Of a folder of `compare`: answers of each way to a prompt, each a task of its own."""
    gold: bool = False
    """The rows' `tiers` are known to be right: hidden tests of the labellers."""
    practice: bool = False
    """The rows' `tiers` and `reason` teach: each labeller does them first, then is told."""
    labeller: str = "import"
    """Who gave the rows' `tiers`, where the rows do not say it themselves."""
    mode: Mode = "ranking"
    """What labellers do: rank K answers, choose between two, or rate each from 1 to 7."""
    guidelines: Path | None = None
    """Markdown file of the guidelines shown beside each task."""
    members: tuple[str, ...] = ()
    """Labellers who alone see the project, with those who did before; nobody named: everybody."""
    need: Annotated[int, Above(0)] = 1
    """Labellers needed for a task."""
    overlap: Annotated[float, Within(0, 1)] = 0.15
    """Share of the prompts that more labellers see, so that agreement can be measured."""
    overlap_need: Annotated[int, Above(0), OnlyWith("overlap")] = 2
    """Labellers needed for a task of those prompts."""
    gold_share: Annotated[float, Within(0, 0.5)] = 0.05
    """Share of hand-outs that are gold tasks, while a labeller has any left."""
    repeat_share: Annotated[float, Within(0, 0.5)] = 0.03
    """Share of hand-outs that show a labeller an own earlier task again."""
    strategy: Strategy = "random"
    """Which task comes first: any, the one reward models disagree on, or the largest gap."""
    random_share: Annotated[float, Within(0.2, 1)] = 0.2
    """Share of hand-outs that are random whatever the strategy (at least 0.2)."""
    lease_minutes: Annotated[float, Above(0)] = 30.0
    """Minutes without a sign of life after which a task goes to somebody else."""
    seed: Seed = 0
    """Seed of the overlap, of the task order, and of the order of the answers."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.gold and self.practice:
            yield "--gold tests labellers in secret, --practice teaches them; give one"


@dataclass(frozen=True, kw_only=True)
class LabelScoreConfig(ProjectConfig):
    """Score a project's answers with reward models, and hand its tasks out by their scores."""

    reward_model: tuple[str, ...]
    """Reward models: folders, run directories, hub ids, or Python functions (module:function)."""
    template_args: TemplateArgs = "{}"
    """JSON mapping given to their chat templates, such as '{"enable_thinking": false}'."""
    strategy: Literal["uncertainty", "gap"] = "uncertainty"
    """Which task comes first: the one the models disagree on, or the one of the largest gap."""
    device: Device = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    dtype: DType = "auto"
    """Type of the products; auto: bfloat16 where the device multiplies it natively."""
    weights: Weights = "auto"
    """How weights are kept; auto: in the products' type; nf4: linear layers in 4 bits."""
    max_length: Annotated[int, Above(0)] = 1024
    """Most tokens of a prompt with its answer."""
    micro_batch_tokens: Annotated[int, Above(0)] = 8192
    """Most tokens in one forward pass."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        models = len(self.reward_model)
        if models == 0 or (self.strategy == "uncertainty" and models < 2):
            yield (
                f"--strategy {self.strategy} with {models} reward model(s): uncertainty needs two "
                "or more, gap one; name them after --reward-model"
            )
        yield from unread_by_functions(self, "--reward-model", self.reward_model)


@dataclass(frozen=True, kw_only=True)
class LabelExportConfig(ProjectConfig):
    """Write what labellers decided as training rows."""

    output: Path
    """JSONL (.jsonl or .jsonl.gz) to write."""
    form: Form = "rankings"
    """rankings (tiers), dpo (TRL's pairs), hh (transcripts), kto (TRL's labels), or audit (all)."""
    consensus: Annotated[Consensus, DECIDED] = "labeller"
    """One row a labeller; or one a task, by majority or weighted by estimated accuracy."""
    label_margins: Annotated[
        bool, OnlyWith("form", "rankings", "dpo"), OnlyWith("consensus", "labeller")
    ] = False
    """Rows get a `margin` by how strong and how sure the labeller said it is."""
    exclude: Annotated[tuple[str, ...], DECIDED] = ()
    """Labellers whose annotations are left out (logged)."""
    eval_fraction: Annotated[float, Within(0, 1, with_high=False), DECIDED] = 0.0
    """Share of the prompts written to a second file, NAME.eval.jsonl."""
    wait: bool = False
    """Wait until every task has the annotations it needs."""
    wait_seconds: Annotated[float, Above(0), OnlyWith("wait")] = 5.0
    """Seconds between looks while waiting."""
    seed: Annotated[Seed, OnlyWith("eval_fraction")] = 0
    """Seed of the split."""


@dataclass(frozen=True, kw_only=True)
class LabelReportConfig(ProjectConfig):
    """How good the labels are: agreement, and each labeller's record."""

    output: Path | None = None
    """HTML page to write; the report is printed in any case."""
    seed: Seed = 0
    """Seed of the bootstrap over prompts."""


@dataclass(frozen=True, kw_only=True)
class LabelAddUserConfig(StoreConfig):
    """Add a labeller, or give one a new link, and print the personal link."""

    name: str
    """Name of the labeller."""
    role: Literal["labeller", "admin"] = "labeller"
    """Admins also see progress and quality, adjudicate, and export."""
    url: str = "http://127.0.0.1:8000"
    """Address under which labellers reach the server."""


@dataclass(frozen=True, kw_only=True)
class LabelBackupConfig(StoreConfig):
    """Copy a store as it stands at one moment, while it is served."""

    output: str
    """New SQLite file, or an empty PostgreSQL database (a URL); a copy is a store itself."""
