"""A simulation of steps on 8 to 1,024 GPUs: SFT, DPO and PPO of 7B and 70B, from named assumptions.

Nothing is measured here. Rates of one GPU were (docs/results.md), those of links are others' (see
ASSUMPTIONS). Trainers divide models as FSDP2 does, layer by layer; PPO's answers come from vLLM
servers on GPUs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes; seconds, bytes and operations of one second."""

    operations: float = 0.36 * 793e12  # of a training pass, recomputed ones among them
    bandwidth: float = 2.95e12  # of a GPU's memory
    per_node: int = 8
    gather: float = 350e9  # all-gather's bus bandwidth within a node
    reduce: float = 360e9  # reduce-scatter's
    nic: float = 47e9  # of one network card
    nics: int = 8  # of a node
    base: float = 8.4e-6  # a ring begins
    hop: float = 3.4e-6  # from GPU to GPU
    far_hop: float = 9.6e-6  # from node to node
    tree_hop: float = 50e-6
    small_hop: float = 0.47e-6  # of a message of some KiB, within a node
    small_base: float = 3.6e-6


ASSUMPTIONS = (
    ("products in bfloat16", "793 TFLOP/s", "measured on an H100, results.md"),
    ("of them in a training pass", "36 %", "measured, SFT and DPO of 1B, results.md"),
    ("memory of a GPU", "2.95 TB/s, 80 GB", "measured, results.md"),
    (
        "of the bandwidth's bound in decoding, at batch 1, 8, 32, 128",
        "55, 51, 45, 33 %",
        "measured for 8B with prefloop's own engine, results.md; more answers: as 128",
    ),
    ("GPUs of a node", "8", "DGX and HGX H100"),
    ("all-gather, reduce-scatter within a node", "350, 360 GB/s", "NVIDIA/nccl issue 1281, H100"),
    ("network", "8 cards of 47 GB/s a node", "NVIDIA/nccl-tests issue 290, 400 Gb/s InfiniBand"),
    ("seconds of a ring", "latency + S (n-1)/n / bandwidth", "NVIDIA/nccl-tests, PERFORMANCE.md"),
    (
        "latency of a ring of n ranks on m nodes",
        "8.4 + 3.4 (n-m) + 9.6 (m-1) µs",
        "NVIDIA/nccl 01afd20, src/graph/tuning.cc, Ring/Simple",
    ),
    (
        "all-reduce between m nodes, a card a GPU",
        "the faster of ring and tree (2 log2 m × 50 µs, 90 % of bandwidth)",
        "the same file, Tree/Simple",
    ),
    ("weights", "2 bytes kept and gathered (--weights bfloat16)", "training/sharded_plan.py"),
    ("gradients", "4 bytes as they are summed", "models/sharding.py: in float32"),
    (
        "layers",
        "the next is gathered while one computes; neither slows the other",
        "FSDP2; optimistic",
    ),
    ("activations", "recomputed: 4 forward passes a step, not 3", "--gradient-checkpointing"),
    ("micro-batches", "of 8,192 tokens, PPO 4,096; each gathers and sums every layer", ""),
    (
        "memory",
        "12 bytes a trained weight and 2 a frozen one, divided; activations and what is gathered "
        "whole; 90 % of 80 GB",
        "within 3 % of the plans in gpus.md on one GPU",
    ),
    ("not counted", "launching of kernels, waiting for the slowest, disks, failures", "optimistic"),
)


class Shape(NamedTuple):
    """A Llama by its numbers."""

    width: int
    layers: int
    inner: int
    key_width: int  # of keys, and of values
    vocabulary: int

    @property
    def layer(self) -> int:
        """Weights of a decoder layer."""
        attention = 2 * self.width * (self.width + self.key_width)
        return attention + 3 * self.width * self.inner + 2 * self.width

    @property
    def rest(self) -> int:
        """Embeddings, head and last norm."""
        return 2 * self.vocabulary * self.width + self.width

    @property
    def weights(self) -> int:
        """All."""
        return self.layers * self.layer + self.rest


SHAPES = {
    "7B": Shape(4096, 32, 11008, 4096, 32000),  # Llama 2
    "70B": Shape(8192, 80, 28672, 1024, 128256),  # Llama 3.1
}


@dataclass(frozen=True)
class Job:
    """A step's rows, over all ranks."""

    rows: int = 1024
    prompt: int = 1024
    answers: int = 1
    answer: int = 1024
    micro_batch: int = 8192
    ppo_epochs: int = 4
    slots: int = 256  # answers that a server writes at once

    @property
    def tokens(self) -> int:
        """Of a row; its prompt is computed once for all of its answers."""
        return self.prompt + self.answers * self.answer


JOBS = {"sft": Job(), "dpo": Job(answers=2), "ppo": Job(micro_batch=4096)}


@dataclass(frozen=True)
class Mesh:
    """`shards` ranks divide a model; as many copies as there are ranks for learn side by side."""

    ranks: int
    shards: int

    @property
    def replicas(self) -> int:
        """Copies."""
        return self.ranks // self.shards


# --- Links ----------------------------------------------------------------------------------------


def ring_latency(ranks: int, machine: Machine) -> float:
    """Seconds of a ring's steps without their bytes."""
    nodes = -(-ranks // machine.per_node)
    return machine.base + (ranks - nodes) * machine.hop + (nodes - 1) * machine.far_hop


def ring(size: float, ranks: int, bus: float, machine: Machine) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes in all."""
    if ranks == 1:
        return 0.0
    if ranks > machine.per_node:
        bus = min(bus, machine.nics * machine.nic)
    return ring_latency(ranks, machine) + size * (ranks - 1) / ranks / bus


def all_reduce(size: float, nodes: int, machine: Machine) -> float:
    """Seconds of a sum over nodes, in which each GPU has its share of the cards."""
    if nodes == 1:
        return 0.0
    rail = machine.nics * machine.nic / machine.per_node
    steps = 2 * (nodes - 1)
    rings = machine.base + steps * machine.far_hop + steps / nodes * size / rail
    tree = 2 * math.log2(nodes) * machine.tree_hop + 2 * size / (0.9 * rail)
    return min(rings, tree)


# --- A pass ---------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """Seconds of a model's passes over one micro-batch."""

    forward: float
    backward: float


def passes(shape: Shape, job: Job, mesh: Mesh, tokens: float, machine: Machine) -> Pass:
    """A forward and a backward pass over `tokens` tokens of a rank.

    Forward: layer l computes while l + 1 is gathered. Backward: it computes again and
    differentiates (3 times the forward pass) while l - 1 is gathered and l + 1 reduced.
    """
    length = job.prompt + job.answer
    each = tokens * (2 * shape.layer + 2 * length * shape.width) / machine.operations
    answered = tokens * job.answers * job.answer / job.tokens
    head = answered * 2 * shape.vocabulary * shape.width / machine.operations
    gather = ring(2 * shape.layer, mesh.shards, machine.gather, machine)
    reduce = _reduced(shape.layer, mesh, machine)
    further = shape.layers - 1
    start = ring(2 * shape.rest, mesh.shards, machine.gather, machine) + gather
    forward = start + further * max(each, gather) + each + head
    end = reduce + _reduced(shape.rest, mesh, machine)
    backward = 2 * head + gather + further * max(3 * each, gather + reduce) + 3 * each + end
    return Pass(forward, backward)


def _reduced(weights: int, mesh: Mesh, machine: Machine) -> float:
    """Gradients summed among the ranks of a copy, then among copies, each in nodes of its own."""
    size = 4.0 * weights
    among = all_reduce(size / mesh.shards, mesh.replicas, machine)
    return ring(size, mesh.shards, machine.reduce, machine) + among


# --- A step ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Seconds of an optimiser step (of PPO: of an iteration's learning), and what they go into."""

    seconds: float
    parts: Mapping[str, float]

    @property
    def computing(self) -> float:
        """Share of the time in which a rank computes what is its even part."""
        return self.parts["computing"] / self.seconds

    @property
    def waits_for(self) -> str:
        """The largest of the other parts."""
        others = {name: part for name, part in self.parts.items() if name != "computing"}
        return max(others, key=lambda name: others[name])


@dataclass(frozen=True)
class Work:
    """Passes over each row: `forwards` without gradients, then `learns` whole ones."""

    forwards: int
    learns: int


WORKS = {  # DPO in its first epoch, with the reference's pass
    "sft": Work(0, 1),
    "dpo": Work(1, 1),
}


def step(shape: Shape, job: Job, work: Work, mesh: Mesh, machine: Machine) -> Step:
    """A step, told apart by leaving out one hindrance after the other."""
    rows = -(-job.rows // mesh.ranks)  # of the fullest rank
    quick = replace(machine, base=0.0, hop=0.0, far_hop=0.0, tree_hop=0.0)
    free = replace(quick, gather=math.inf, reduce=math.inf, nic=math.inf)
    times = [_seconds(shape, job, work, mesh, rows, one) for one in (machine, quick, free)]
    times.append(_seconds(shape, job, work, mesh, job.rows / mesh.ranks, free))
    names = ("steps of rings", "bytes on links", "rows that do not divide", "computing")
    gaps = [high - low for high, low in zip(times, [*times[1:], 0.0], strict=True)]
    return Step(times[0], dict(zip(names, gaps, strict=True)))


def _seconds(
    shape: Shape, job: Job, work: Work, mesh: Mesh, rows: float, machine: Machine
) -> float:
    tokens = rows * job.tokens
    count = math.ceil(tokens / job.micro_batch)
    one = passes(shape, job, mesh, tokens / count, machine)
    update = 16 * shape.weights / mesh.shards / machine.bandwidth  # reads and writes
    return count * (work.forwards * one.forward + work.learns * sum(one)) + update


# --- Answers --------------------------------------------------------------------------------------


def decode_share(batch: float) -> float:
    """Of the bandwidth's bound, between the measured points in the logarithm of the batch."""
    points = ((1, 0.55), (8, 0.51), (32, 0.45), (128, 0.33))
    for (low, high_share), (high, low_share) in pairwise(points):
        if batch <= high:
            part = math.log(max(batch, 1) / low) / math.log(high / low)
            return high_share + part * (low_share - high_share)
    return points[-1][1]


def rollout(shape: Shape, job: Job, gpus: int, machine: Machine) -> float:
    """Seconds in which servers write all answers; a server has the GPUs that its weights need."""
    width = servers_width(shape)
    servers = gpus // width
    answers = -(-job.rows * job.answers // servers)
    rounds = -(-answers // job.slots)
    batch = answers / rounds
    kept = 4 * shape.layers * shape.key_width * (job.prompt + job.answer / 2)  # bytes an answer
    read = (2 * shape.weights + batch * kept) / width
    token = read / machine.bandwidth / decode_share(batch)
    if width > 1:
        hops = machine.small_base + 2 * (width - 1) * machine.small_hop
        token += 2 * shape.layers * hops
    prompts = answers * job.prompt * 2 * shape.weights / width / machine.operations
    return rounds * job.answer * token + prompts


def servers_width(shape: Shape) -> int:
    """GPUs of a server: weights of 2 bytes in at most half of their memory."""
    width = 1
    while 2 * shape.weights > width * 40e9:
        width *= 2
    return width


class Iteration(NamedTuple):
    """PPO's, with the servers that make it shortest."""

    servers: int  # GPUs that write
    writing: float
    handing: float  # the weights to the servers
    learning: Step
    seconds: float

    @property
    def overlapped(self) -> float:
        """Seconds where the next answers are written meanwhile, one step off-policy."""
        return max(self.writing, self.learning.seconds) + self.handing


def ppo_iteration(
    shape: Shape,
    gpus: int,
    machine: Machine,
    least: int,
    job: Job = JOBS["ppo"],
    overlap: bool = False,
) -> Iteration:
    """Four models of one size; the trainers have at least `least` GPUs.

    Weighing: a pass each of policy, reference, critic and reward model. Learning: policy and
    critic, `ppo_epochs` times. The weights reach the servers at one card's rate.
    """
    found = []
    for part in range(1, 8):
        writers = gpus * part // 8 // servers_width(shape) * servers_width(shape)
        trainers = gpus - writers
        if not writers or trainers < least:
            continue
        work = Work(4, 2 * job.ppo_epochs)
        learning = step(shape, job, work, Mesh(trainers, trainers), machine)
        writing = rollout(shape, job, writers, machine)
        handing = 2 * shape.weights / machine.nic
        seconds = writing + handing + learning.seconds
        found.append(Iteration(writers, writing, handing, learning, seconds))
    return min(found, key=lambda one: one.overlapped if overlap else one.seconds)


# --- Tables ---------------------------------------------------------------------------------------

ROOM = 0.9 * 80e9
ENOUGH = 0.8  # of a GPU's tokens where the model just fits
Least = Mapping[tuple[str, str], int]
"""By size and command: the fewest GPUs on which it fits."""


def meshes(gpus: int, least: int, per_node: int = 8) -> list[Mesh]:
    """All that divide a model among `least` GPUs or more, in whole nodes."""
    sizes = [gpus >> k for k in range(gpus.bit_length()) if gpus >> k >= max(least, per_node)]
    return [Mesh(gpus, size) for size in sizes]


def quickest(
    shape: Shape, command: str, gpus: int, least: int, machine: Machine, job: Job | None = None
) -> tuple[Mesh, Step]:
    """The mesh on which a step takes least, the most divided one of equals."""
    job = job or JOBS[command]
    made = [(m, step(shape, job, WORKS[command], m, machine)) for m in meshes(gpus, least)]
    return min(made, key=lambda one: round(one[1].seconds, 6))


def holds_to(seconds: Mapping[int, float]) -> int:
    """The most GPUs whose every one does ENOUGH of what it does on the fewest, rows fixed."""
    first = min(seconds)
    return max(n for n in seconds if seconds[first] * first >= ENOUGH * seconds[n] * n)


def supervised_table(
    command: str, least: Least, machine: Machine, job: Job | None = None
) -> list[str]:
    """Seconds of a step by GPUs, divided among all, and in the quickest mesh."""
    lines = [
        "| model | GPUs | all share one copy: seconds | computing | most else | quickest mesh | "
        "seconds | computing | tokens/s a GPU |",
        "|---|---:|---:|---:|---|---|---:|---:|---:|",
    ]
    job, work = job or JOBS[command], WORKS[command]
    for size, shape in SHAPES.items():
        fewest = least[size, command]
        for gpus in [n for n in GPUS if n >= fewest]:
            flat = step(shape, job, work, Mesh(gpus, gpus), machine)
            mesh, best = quickest(shape, command, gpus, fewest, machine, job)
            rate = job.rows * job.tokens / best.seconds / gpus
            lines.append(
                f"| {size} | {gpus} | {_s(flat.seconds)} | {flat.computing:.0%} | "
                f"{flat.waits_for} | {mesh.replicas}x{mesh.shards} | {_s(best.seconds)} | "
                f"{best.computing:.0%} | {rate:,.0f} |"
            )
    return lines


def ppo_table(least: Least, machine: Machine) -> list[str]:
    """An iteration by GPUs: one after the other, and with the next answers written meanwhile."""
    lines = [
        "| model | GPUs | of them servers | writing | weights handed over | learning | computing | "
        "iteration | overlapped: servers | iteration |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, shape in SHAPES.items():
        fewest = least[size, "ppo"]
        for gpus in [n for n in GPUS if n > fewest]:
            one = ppo_iteration(shape, gpus, machine, fewest)
            both = ppo_iteration(shape, gpus, machine, fewest, overlap=True)
            lines.append(
                f"| {size} | {gpus} | {one.servers} | {_s(one.writing)} | {_s(one.handing)} | "
                f"{_s(one.learning.seconds)} | {one.learning.computing:.0%} | {_s(one.seconds)} | "
                f"{both.servers} | {_s(both.overlapped)} |"
            )
    return lines


def networks_table(least: Least) -> list[str]:
    """SFT's step on worse links, divided among all and by node."""
    kinds = {
        "8 cards of 47 GB/s a node": Machine(),
        "1 card of 47 GB/s a node": Machine(nics=1),
        "1 card of 12 GB/s (100 Gb/s) a node": Machine(nics=1, nic=12e9),
    }
    lines = [
        "| model | GPUs | network | all share one copy: seconds | computing | quickest mesh | "
        "seconds | computing |",
        "|---|---:|---|---:|---:|---|---:|---:|",
    ]
    for size, gpus in (("7B", 64), ("7B", 512), ("70B", 64), ("70B", 512)):
        for name, machine in kinds.items():
            shape, fewest = SHAPES[size], least[size, "sft"]
            flat = step(shape, JOBS["sft"], WORKS["sft"], Mesh(gpus, gpus), machine)
            mesh, best = quickest(shape, "sft", gpus, fewest, machine)
            lines.append(
                f"| {size} | {gpus} | {name} | {_s(flat.seconds)} | {flat.computing:.0%} | "
                f"{mesh.replicas}x{mesh.shards} | {_s(best.seconds)} | {best.computing:.0%} |"
            )
    return lines


def growing_table(least: Least, machine: Machine) -> list[str]:
    """SFT where rows grow with the GPUs: a micro-batch of 8,192 tokens for each, one copy."""
    lines = ["| model | GPUs | seconds | computing | most else |", "|---|---:|---:|---:|---|"]
    for size, shape in SHAPES.items():
        for gpus in [n for n in GPUS if n >= least[size, "sft"]]:
            job = replace(JOBS["sft"], rows=4 * gpus)
            one = step(shape, job, WORKS["sft"], Mesh(gpus, gpus), machine)
            lines.append(
                f"| {size} | {gpus} | {_s(one.seconds)} | {one.computing:.0%} | {one.waits_for} |"
            )
    return lines


def stops(least: Least, machine: Machine) -> list[str]:
    """Up to how many GPUs each still does 80 % of what it does on the fewest."""
    lines = ["| model | command | fewest GPUs | 80 % a GPU up to |", "|---|---|---:|---:|"]
    for (size, command), fewest in least.items():
        shape = SHAPES[size]
        if command == "ppo":
            there = [n for n in GPUS if n > fewest]
            found = {n: ppo_iteration(shape, n, machine, fewest).seconds for n in there}
        else:
            there = [n for n in GPUS if n >= fewest]
            made = {n: quickest(shape, command, n, fewest, machine)[1] for n in there}
            found = {n: one.seconds for n, one in made.items()}
        lines.append(f"| {size} | {command} | {there[0]} | {holds_to(found)} |")
    return lines


def assumptions_table() -> list[str]:
    """What the figures stand on."""
    return [
        "| what | value | from |",
        "|---|---|---|",
        *(f"| {' | '.join(a)} |" for a in ASSUMPTIONS),
    ]


def _s(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def tables() -> dict[str, list[str]]:
    """All, by title."""
    machine = Machine()
    least, memory = memory_table()
    return {
        "Assumptions": assumptions_table(),
        "Memory": memory,
        "SFT": supervised_table("sft", least, machine),
        "DPO": supervised_table("dpo", least, machine),
        "PPO": ppo_table(least, machine),
        "Worse networks": networks_table(least),
        "SFT, 128 rows": supervised_table("sft", least, machine, Job(rows=128)),
        "Rows that grow with the GPUs": growing_table(least, machine),
        "Where it stops": stops(least, machine),
    }


# --- Memory ---------------------------------------------------------------------------------------


def held(
    shape: Shape, job: Job, shards: int, learns: int = 1, frozen: int = 0, each: int = 12
) -> float:
    """Bytes of a rank at the end of a backward pass: `learns` models that learn, `frozen` that do
    not, all of one shape.

    Divided: `each` bytes a trained weight (bfloat16 weights and gradients, float32 moments), 2 a
    frozen one. Whole: two layers and what belongs to none, with one layer's gradients; every
    layer's input in float32; a layer computed again; log-probs of a micro-batch's answers.
    """
    divided = (each * learns + 2 * frozen) * shape.weights / shards
    alone = 0 if shards == 1 else 1
    gathered = 2 * (learns * shape.rest + 2 * shape.layer) * alone
    gradients = 2 * (learns * shape.rest + shape.layer) if alone else shape.rest
    tokens = job.micro_batch
    inputs = 4 * learns * shape.layers * tokens * shape.width
    again = tokens * (16 * shape.width + 8 * shape.inner)
    logits = 8 * tokens * job.answers * job.answer / job.tokens * shape.vocabulary
    return divided + gathered + gradients + inputs + again + logits


def fitting(command: str, shape: Shape) -> tuple[int, list[float]]:
    """The fewest GPUs that hold a run, and a rank's bytes on each number."""
    roles = {"sft": (1, 0), "dpo": (1, 0), "ppo": (2, 2)}[command]
    sizes = [held(shape, JOBS[command], gpus, *roles) for gpus in GPUS]
    return next(n for n, size in zip(GPUS, sizes, strict=True) if size <= ROOM), sizes


def memory_table() -> tuple[dict[tuple[str, str], int], list[str]]:
    """The fewest GPUs of each run, and a table of GiB."""
    least: dict[tuple[str, str], int] = {}
    lines = [
        "| model | command | GiB of a rank on " + " | ".join(map(str, GPUS)) + " GPUs | fewest |",
        "|---|---|" + "---:|" * (len(GPUS) + 1),
    ]
    for name, shape in SHAPES.items():
        for command in JOBS:
            least[name, command], sizes = fitting(command, shape)
            cells = " | ".join(f"{size / 2**30:.0f}" for size in sizes)
            lines.append(f"| {name} | {command} | {cells} | {least[name, command]} |")
    return least, lines


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """All tables, printed and returned; nothing is computed in a type or by threads."""
    found = tables()
    for title, lines in found.items():
        print(f"\n{title}\n", *lines, sep="\n", flush=True)
    return {"scaling": found}
