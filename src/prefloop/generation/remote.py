"""A RolloutEngine over vLLM servers on other machines (see docs/rollouts.md).

Every answer is a request of its own with a seed of its own. A server that fails is left out until
it holds the present weights again; its answers under way are asked of whichever server is free. An
answer counts once it has come from a server that held the weights before and after.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefloop import distributed
from prefloop.config import PPOConfig
from prefloop.config.rollouts import RolloutConfig
from prefloop.errors import UserError
from prefloop.generation.engine import in_process
from prefloop.generation.protocol import EngineConfig, Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.generation.server import KEY, Reply, Server, Weights
from prefloop.http_json import Again, Denied, Refused, delay
from prefloop.models import adapters
from prefloop.models.export import export_model
from prefloop.models.model import LoadedModel
from prefloop.terminal import shown

TRIES = 8
Slot = tuple[int, int]  # a sample's place: (prompt_index, sample_index)


@dataclass(eq=False)
class _State:
    """What the engine knows of a server; read and written under the engine's lock."""

    server: Server
    ready: Weights | None = None  # what it was found to hold; None: out
    loads: int = 0  # how often weights were put into it: an answer from before may be another's
    busy: int = 0  # requests under way
    failures: int = 0  # since its last answer
    coming: bool = False  # a thread is bringing it back
    why: str = ""  # why it is out


@dataclass(eq=False)
class _Job:
    """One call of `generate`."""

    weights: Weights
    version: int
    prompts: Prompts
    sampling: Sampling
    seeds: dict[Slot, int]
    todo: deque[Slot]
    done: dict[Slot, Reply] = field(default_factory=dict)
    fresh: deque[Slot] = field(default_factory=deque)  # done, and not told of yet
    tries: Counter[Slot] = field(default_factory=Counter)
    error: Exception | None = None
    over: bool = False


class Remote:
    """See RolloutEngine; `max_concurrent` answers are asked for at once, over all servers."""

    def __init__(
        self,
        servers: Sequence[Server],
        model: LoadedModel,
        folder: Path | None,
        max_concurrent: int,
        patience: float,
        backoff: float = 0.5,
    ) -> None:
        """`folder`: where weights that change are written; None: the model's stay as on disk.

        `backoff`: seconds until a server that failed is looked at, doubled each time it fails.
        """
        self.model, self.folder, self.max_concurrent = model, folder, max_concurrent
        self.patience, self.backoff, self.version = patience, backoff, 0
        self.weights: Weights | None = None
        self._states = [_State(server) for server in servers]
        self._token, self._serial = distributed.gather(secrets.token_hex(4))[0], 0
        self._changed = threading.Condition()  # guards states and the job under way
        self._last = 0.0  # when a server last replied
        if folder and distributed.rank() == 0:
            weakref.finalize(self, _remove, folder, f"prefloop-{self._token}-*")

    # --- weights ---------------------------------------------------------------------------------

    def sync(self, model: LoadedModel, version: int) -> None:
        """See RolloutEngine. The first rank writes the weights and puts them on the servers; one
        that is away gets them when it is back.
        """
        assert self.folder is not None, "an engine that samples from what is on disk"
        self._serial += 1
        self.model, self.version = model, version
        place = self.folder / self._name(self._serial)
        if distributed.rank() == 0 or model.sharded is not None:  # slices come from all ranks
            export_model(model, place)
        distributed.barrier()
        self._take(str(place))
        if distributed.rank() == 0:  # a server may still be loading those before
            _remove(self.folder, self._name(self._serial - 2))

    def _name(self, serial: int | str) -> str:
        return f"prefloop-{self._token}-{serial}"

    def _take(self, folder: str) -> None:
        """Samples from a folder's weights from now on, on the servers that are there."""
        folder, *base = map(_absolute, adapters.chain(folder))
        if len(base) > 1:
            raise UserError(
                f"{folder}: an adapter on an adapter, which a server does not load; merge it with "
                "`prefloop export --merge`"
            )
        before = self.weights.mark if self.weights else ""
        below = (base[0], self._name("base")) if base else ()
        weights = Weights(folder, self._name(self._serial), *below)
        problems: list[str] = []

        def bring(state: _State) -> None:
            try:
                self._bring(state, weights, before)
            except Again as error:
                self._leave_out(state, str(error))
            except (UserError, Denied, Refused) as error:
                problems.append(_told(state, error))

        if distributed.rank() == 0:
            threads = [threading.Thread(target=bring, args=(state,)) for state in self._states]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for problem in distributed.gather(problems)[0]:
            raise UserError(problem)
        self.weights = weights

    def _bring(self, state: _State, weights: Weights, before: str = "") -> None:
        """Makes a server hold the weights."""
        state.server.put(weights, before)
        with self._changed:
            state.loads += 1
            state.ready, state.why, self._last = weights, "", time.monotonic()
            self._changed.notify_all()

    def _leave_out(self, state: _State, why: str) -> None:
        with self._changed:
            new = why != state.why
            state.ready, state.why = None, why
            state.failures += 1
            self._changed.notify_all()
        if new:
            text = f"{state.server}: {why}; left out until it holds the weights"
            print(shown(text), file=sys.stderr)

    def _bring_back(self, state: _State, job: _Job) -> None:
        """Until the server holds the job's weights, or the job is over."""
        while True:
            with self._changed:
                pause = delay(min(state.failures, 7) - 1, self.backoff) if state.failures else 0.0
                self._changed.wait_for(lambda: job.over, pause)
                if job.over:
                    state.coming = False
                    return
            try:
                self._bring(state, job.weights)
                state.server.require_exact(job.sampling)
                with self._changed:
                    state.coming = False
                if state.failures:
                    print(shown(f"{state.server}: holds the weights again"), file=sys.stderr)
                return
            except Again as error:
                self._leave_out(state, str(error))
            except Exception as error:  # no other try will fare better
                with self._changed:
                    state.coming = False
                    job.error = job.error or _as_user_error(state, error)
                    self._changed.notify_all()
                return

    # --- answers ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine; equal to rounding, for a server computes several answers at once."""
        self._check(prompts, n, sampling)
        if self.weights is None:
            self._take(str(self.model.source))
        assert self.weights is not None
        places = range(len(prompts)) if numbers is None else numbers
        slots = [(index, number) for index in range(len(prompts)) for number in range(n)]
        seeds = {(i, k): request_seed(seed, places[i], k) for i, k in slots}
        job = _Job(self.weights, self.version, prompts, sampling, seeds, deque(slots))
        for state in self._states:
            if state.ready is self.weights:
                state.server.require_exact(sampling)
        self._last = time.monotonic()
        threads = min(self.max_concurrent, len(slots))
        samples: dict[Slot, Sample] = {}
        try:
            for _ in range(threads):
                threading.Thread(target=self._work, args=(job,), daemon=True).start()
            while len(samples) < len(slots):
                for slot in self._next(job):
                    reply = job.done[slot]
                    reason = "stop" if reply.stopped else "length"
                    sample = Sample(*slot, reply.tokens, reply.log_probs, reason, job.version)  # type: ignore[arg-type]
                    samples[slot] = sample
                    if on_done is not None:
                        on_done(sample)
        finally:
            with self._changed:
                job.over = True
                self._changed.notify_all()
        return [[samples[i, k] for k in range(n)] for i in range(len(prompts))]

    def _check(self, prompts: Prompts, n: int, sampling: Sampling) -> None:
        if n < 1:
            raise UserError(f"n = {n} samples per prompt: give at least 1")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {number} has no tokens: give at least one, such as BOS")
            self.model.check_length(len(prompt) + sampling.max_new_tokens)

    def _next(self, job: _Job) -> list[Slot]:
        """Answers that have come since; brings servers back that are out."""
        with self._changed:
            for state in self._states:
                if state.ready is not job.weights and not state.coming:
                    state.coming = True
                    bring = threading.Thread(target=self._bring_back, args=(state, job))
                    bring.daemon = True
                    bring.start()
            self._changed.wait_for(lambda: job.fresh or job.error, 1.0)
            if job.error:
                raise job.error
            fresh = list(job.fresh)
            job.fresh.clear()
            away = time.monotonic() - self._last
            if away > self.patience and all(s.ready is not job.weights for s in self._states):
                whys = "; ".join(f"{state.server}: {state.why}" for state in self._states)
                raise UserError(
                    f"--rollout-engine: no reply for {away:.0f} seconds ({whys}); start the "
                    "servers, and give the command again"
                )
        return fresh

    def _work(self, job: _Job) -> None:
        """Asks for one answer after another, each of the server with the fewest under way."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: job.over or (job.todo and self._freest(job)))
                state = self._freest(job)
                if job.over or state is None:
                    return
                slot = job.todo.popleft()
                state.busy += 1
                loads = state.loads
            reply: Reply | None = None
            fault: Exception | None = None
            try:
                reply = state.server.complete(
                    job.weights, job.prompts[slot[0]], job.sampling, job.seeds[slot]
                )
            except Exception as error:
                fault = error
            with self._changed:
                state.busy -= 1
                same = state.loads == loads
                if reply and same and slot not in job.done:
                    job.done[slot] = reply
                    job.fresh.append(slot)
                    state.failures, self._last = 0, time.monotonic()
                else:
                    job.tries[slot] += isinstance(fault, Again)
                    job.todo.append(slot)
                    if fault and (job.tries[slot] >= TRIES or not isinstance(fault, Again)):
                        where = f"prompt {slot[0]}"
                        job.error = job.error or _as_user_error(state, fault, where)
                self._changed.notify_all()
            if isinstance(fault, Again) and same:
                self._leave_out(state, str(fault))

    def _freest(self, job: _Job) -> _State | None:
        there = [state for state in self._states if state.ready is job.weights]
        return min(there, key=lambda state: state.busy, default=None)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def _remove(folder: Path, pattern: str) -> None:
    for old in folder.glob(pattern):
        shutil.rmtree(old, ignore_errors=True)


def _told(state: _State, error: Exception) -> str:
    told = str(error)
    if isinstance(error, UserError):
        return told
    remedy = "see its log"
    if isinstance(error, Denied) and error.status in (401, 403):
        remedy = f"give its API key in {KEY}"
    return f"{state.server}: {told}; {remedy}"


def _as_user_error(state: _State, error: Exception, where: str = "") -> Exception:
    if not isinstance(error, UserError | Again | Denied | Refused):
        return error
    return UserError(f"{where}: {_told(state, error)}" if where else _told(state, error))


def request_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """A server's seed of one sample: below 2^63, of nothing but the three numbers."""
    text = f"{seed}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def engine_for(config: EngineConfig, model: LoadedModel) -> RolloutEngine:
    """The engine that --rollout-engine names; in this process where it names none."""
    if not isinstance(config, RolloutConfig) or not config.rollout_engine:
        return in_process(config, model)
    key = os.environ.get(KEY, "").strip()
    servers = [
        Server(url, config.rollout_timeout, config.rollout_patience, key)
        for url in config.rollout_servers
    ]
    folder = config.rollout_folder if isinstance(config, PPOConfig) else None
    if isinstance(config, PPOConfig) and folder is None:
        folder = config.output / "rollout"
        if distributed.rank() == 0:  # what a run that was killed left there
            shutil.rmtree(folder, ignore_errors=True)
    return Remote(servers, model, folder, config.max_concurrent, config.rollout_patience)
