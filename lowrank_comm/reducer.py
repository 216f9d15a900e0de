"""The reducer: one compressed averaging of all gradients of a model.

The order of a step:

1. Agreement (before the first pass, and when a worker asks for it because it loaded a state or has new parameters). A
   fingerprint of settings, parameters and step is compared between the workers.
2. Delta. For each batch of same-shape matrices the gradients are stacked and the error memory is added: Delta = g / scale
   + e. A missing gradient counts as zero. Small matrices share a batch; a large one is a batch of its own.
3. Phases. The compressors' generators run in lock-step (`lockstep`): each phase is one packet, one collective. Phase one
   also carries what is dense, one finite flag, and which gradients are missing.
4. Veto. If any worker's numbers are not finite, the pass ends here on all workers; nothing has been changed.
5. Decode. P Q^T, times the scale, is written into the gradients.
6. The pass leaves a pending transaction. `commit` writes e <- Delta - sent, the bases, and the step counter;
   `rollback` forgets it. An engine that decides later whether the step counts (loss scaling) decides between the two.

All state is keyed by parameter name. Order of batches and requests follows the order of the slots, the same on all
workers. `exchange` is a generator that yields buffers to be summed, so that a process group and the simulation of N
workers in one process run the same code.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import Batch, Slot, build_batches
from .communication import Group, Ledger, check_same
from .compressors.base import Compressor, Context, Delta, LowRank, Result, Steps
from .diagnostics import Plan, StepReport
from .error_feedback import ErrorFeedback
from .errors import ConfigError, LowRankCommError
from .linalg import full_precision
from .lockstep import Account, Agreed, Stopped, lockstep
from .policy import Policy, Rule, Treatment
from .reporting import LastPass, make_plan

__all__ = ["Outcome", "Reducer", "Slot"]

_log = logging.getLogger("lowrank_comm")

WIRE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """How a pass ended.

    Attributes:
        applied: False if it was vetoed: some worker's numbers were not finite, and nothing was changed.
        grads: in slot order; the tensors given, holding the result; a new tensor where this worker had none but another
            had; None where nobody had one.
        compare: some worker asked to compare settings first: `agree`, then pass again.
    """

    applied: bool
    grads: list[Tensor | None]
    compare: bool = False


@dataclass
class _Job:
    """A batch, or some rows of it, in one pass."""

    batch: Batch
    rows: list[int] | None
    context: Context
    delta: Delta | None = None
    result: Result | None = None

    @property
    def indices(self) -> list[int]:
        """Rows as numbers."""
        return list(range(len(self.batch.names))) if self.rows is None else self.rows


@dataclass
class _Pending:
    """What commit will make true."""

    jobs: list[_Job]
    present: list[bool]


class Reducer:
    """Averages gradients over a group of workers through a compressor with error feedback.

    Args:
        slots: the parameters, in the same order on all workers; names are unique.
        compressor: the scheme.
        group: the workers.
        min_compression_rate, rules: see `policy`.
        error_feedback: how the error memory is kept.
        wire_dtype: "bfloat16", "float16", "float32", "float64", or None for the wider of float32 and the parameter's dtype.
        seed: of all random draws.
        initial_basis: parameter name -> Q (n x r) to start from, instead of a Gaussian one.

    Raises:
        ConfigError: a name occurs twice, a dtype is unknown, or an initial basis does not fit.

    Source: Algorithm 2 of arXiv 2509.11254, steps (7a), (7b) and the error update.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        compressor: Compressor,
        group: Group,
        *,
        min_compression_rate: float = 2.0,
        rules: Sequence[Rule] = (),
        error_feedback: ErrorFeedback | None = None,
        wire_dtype: str | None = None,
        seed: int = 0,
        initial_basis: Mapping[str, Tensor] | None = None,
    ) -> None:
        if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
            raise ConfigError(f"wire_dtype={wire_dtype!r} is unknown; use null or one of {', '.join(WIRE_DTYPES)}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ConfigError(f"seed must be an integer of 64 bits, got {seed!r}; write for example seed=0.")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ConfigError(
                    f'rules must hold Rule objects such as Rule("lm_head.*", treatment="dense"), got {rule!r}.'
                )
        if error_feedback is not None and not isinstance(error_feedback, ErrorFeedback):
            raise ConfigError(
                f'error_feedback must be None or such as ErrorFeedback(dtype="bfloat16"), got {error_feedback!r}.'
            )
        for slot in slots:
            if not slot.dtype.is_floating_point:
                raise ConfigError(
                    f"{slot.name}: parameters of {slot.dtype} cannot be averaged here; use a real floating dtype."
                )
        self.slots, self.compressor, self.group, self.seed = list(slots), compressor, group, seed
        names = [slot.name for slot in self.slots]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ConfigError(f"parameter names must be unique, but {twice[0]!r} occurs twice; give each its own name.")
        self.step = 0
        self.further_settings: Callable[[], dict[str, Any]] | None = None  # of whoever uses the reducer; compared too
        self.ledger = Ledger()
        self._error_feedback = error_feedback or ErrorFeedback()
        self._wire_name, self._wire_dtype = wire_dtype, WIRE_DTYPES.get(wire_dtype or "")
        self._policy = Policy(compressor, min_compression_rate, tuple(rules))
        self.treatments: list[Treatment] = [self._policy.treat(slot.name, slot.shape) for slot in self.slots]
        self._batches = build_batches(
            self.slots, self.treatments, compressor, self._error_feedback, seed, group.rank, initial_basis or {}
        )
        self._initial_basis = {name: _digest(basis) for name, basis in (initial_basis or {}).items()}
        self._place = {name: (batch, row) for batch in self._batches for row, name in enumerate(batch.names)}
        self._dense = [k for k, treatment in enumerate(self.treatments) if not treatment.low_rank]
        low = {slot.name: t for slot, t in zip(self.slots, self.treatments, strict=True) if t.low_rank}
        self._schedule = compressor.schedule(
            {name: compressor.restart_elements(t.m, t.n, t.rank) for name, t in low.items()}
        )
        self.device = self.slots[0].device if self.slots else torch.device("cpu")
        self._agreed = self._ask_to_compare = False
        self._worker: tuple[int, int] | None = None
        self._consolidated_at: int | None = None
        self._pending: _Pending | None = None
        self._last: LastPass | None = None

    # ---------------------------------------------------------------- a step

    def reduce(self, grads: Sequence[Tensor | None], *, scale: float = 1.0) -> Outcome:
        """One lock-step pass over all parameters; a collective, to be called by every worker.

        Args:
            grads: this worker's gradients in slot order, None where it has none; overwritten with the result.
            scale: the loss scale that the gradients carry. The error memory is kept without it.

        Returns:
            The outcome. Unless it was vetoed, `commit` or `rollback` must follow.

        Raises:
            ConfigMismatchError: first pass only, on every worker, if settings or parameters differ.
            LowRankCommError: the last pass was neither committed nor rolled back, or the list does not fit the slots.
        """
        if not self._agreed:
            self.agree()
        outcome = self._drive(grads, scale)
        if outcome.compare:
            self.agree()
            outcome = self._drive(grads, scale)
        return outcome

    def _drive(self, grads: Sequence[Tensor | None], scale: float) -> Outcome:
        passing = self.exchange(grads, scale)
        with full_precision(self.device):
            try:
                buffers = next(passing)
                while True:
                    buffers = passing.send(self.group.sum_(buffers))
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome

    def agree(self) -> None:
        """Compare settings, parameters and step with the other workers. A collective.

        Once before the first pass, where all workers come by. Later, a worker that has loaded a state or got new
        parameters cannot know whether the others have: it asks in the first packet of its next pass. (Workers that loaded
        different steps would restart at different times, and wait for each other.)
        """
        everything = self.describe() | (self.further_settings() if self.further_settings else {})
        self.ledger.bytes["fingerprint"] += check_same(everything, self.group, self.device)
        self._agreed, self._ask_to_compare = True, False

    @torch.no_grad()
    def exchange(self, grads: Sequence[Tensor | None], scale: float) -> Generator[list[Tensor], int, Outcome]:
        """The pass as a generator: yields buffers to be summed over the workers in place, is sent how many collectives
        that took, returns the outcome. `reduce` drives it over the process group."""
        self._check(grads)
        clock = time.perf_counter()
        account = Account()
        jobs = [job for batch in self._batches for job in self._jobs(batch)]
        steps = [self._steps(job, grads, scale) for job in jobs]
        dense = [self._flat(group, grads, scale) for group in self._dense_groups()]
        account.seconds["compress"] += time.perf_counter() - clock
        agreed = yield from lockstep(
            steps,
            dense,
            [grad is not None for grad in grads],
            workers=self.group.size,
            rank=self.group.rank,
            wire_dtype=self._wire_dtype,
            device=self.device,
            account=account,
            compare=self._ask_to_compare,
        )
        self._worker = (self.group.rank, self.group.size)
        if agreed is Stopped.COMPARE:
            self.ledger.bytes.update(account.bytes)
            self.ledger.collectives += account.collectives
            return Outcome(False, list(grads), compare=True)
        self._enter_ledger(account, jobs, isinstance(agreed, Agreed))
        if isinstance(agreed, Stopped):
            return Outcome(False, list(grads))
        clock = time.perf_counter()
        for job, result in zip(jobs, agreed.results, strict=True):
            job.result = result
        result_grads = self._decode(jobs, agreed, list(grads), scale)
        self._pending = _Pending(jobs, agreed.present)
        account.seconds["decompress"] = time.perf_counter() - clock
        return Outcome(True, result_grads)

    @torch.no_grad()
    def commit(self) -> None:
        """Make the pending pass true: error memory, bases, step counter."""
        if self._pending is None:
            raise LowRankCommError("commit() without a pending pass; call reduce() first.")
        clock = time.perf_counter()
        pending, self._pending = self._pending, None
        assert self._last is not None
        with full_precision(self.device):
            for job in pending.jobs:
                self._commit(job, pending.present, self._last)
        self.step += 1
        self.ledger.restarts += self._last.restarts
        self._last.account.seconds["commit"] = time.perf_counter() - clock

    def _commit(self, job: _Job, present: list[bool], last: LastPass) -> None:
        assert job.result is not None
        assert job.delta is not None
        delta, result, rows = job.delta.tensor, job.result, job.rows
        alive = [row for row in job.indices if present[job.batch.slots[row]]]
        if len(alive) < len(job.indices):  # nobody had a gradient for some: their error and basis stay as they are
            places = [job.indices.index(row) for row in alive]
            delta, result, rows = delta[places], _rows_of_result(result, places), alive
        if alive:
            last.enter(job.batch, rows, delta, result)
            job.batch.keep_error(delta, result, rows, self.step)
            job.batch.store_state(rows, result.state)
        job.delta, job.result = None, None  # Delta is model-sized: let it go now

    def rollback(self) -> None:
        """Forget the pending pass: error memory, bases and step counter stay as they were before it."""
        self._pending = None
        if self._last is not None:
            self._last.applied = False

    @property
    def worker(self) -> tuple[int, int]:
        """(rank, world size) of the last pass, which the error memory is of, also when the process group is gone by now."""
        return self._worker or (self.group.rank, self.group.size)

    @property
    def pending(self) -> bool:
        """Whether a pass waits for commit or rollback."""
        return self._pending is not None

    # ---------------------------------------------------------------- parts of a step

    def _check(self, grads: Sequence[Tensor | None]) -> None:
        if self._pending is not None:
            raise LowRankCommError("reduce() while the last pass is pending; call commit() or rollback() first.")
        if len(grads) != len(self.slots):
            raise LowRankCommError(f"got {len(grads)} gradients for {len(self.slots)} parameters; give one for each slot.")
        for grad, slot in zip(grads, self.slots, strict=True):
            if grad is None:
                continue
            if grad.is_sparse:
                raise LowRankCommError(f"{slot.name}: sparse gradients cannot be averaged here; use sparse=False.")
            if grad.numel() != slot.numel:
                raise LowRankCommError(
                    f"{slot.name}: the gradient has shape {tuple(grad.shape)}, the parameter {slot.shape}; they must agree."
                )

    def _steps(self, job: _Job, grads: Sequence[Tensor | None], scale: float) -> Steps:
        """The compressor's generator; Delta is made when it is first advanced, just before it is read."""
        job.delta = job.batch.delta(grads, scale, job.rows)
        return (yield from self.compressor.step(job.delta, job.batch.rows_of_state(job.rows), job.context))

    def _jobs(self, batch: Batch) -> list[_Job]:
        """The batch as one job, or as two where only some of its matrices restart."""
        due = [bool(self._schedule and self._schedule.due(name, self.step)) for name in batch.names]
        jobs = []
        for restart in (False, True):
            rows = [row for row, is_due in enumerate(due) if is_due == restart]
            if not rows:
                continue
            whole = len(rows) == len(due)
            context = Context(
                tuple(batch.names[row] for row in rows),
                self.step,
                self.seed,
                batch.rank,
                restart,
                wire_rounds=self._wire_dtype is not None and self._wire_dtype.itemsize < batch.dtype.itemsize,
            )
            jobs.append(_Job(batch, None if whole else rows, context))
        return jobs

    def _dense_groups(self) -> list[list[int]]:
        """Dense slots by dtype of computation and device, in slot order."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k in self._dense:
            groups.setdefault((self.slots[k].compute_dtype, self.slots[k].device), []).append(k)
        return list(groups.values())

    def _flat(self, group: list[int], grads: Sequence[Tensor | None], scale: float) -> Tensor:
        """The dense gradients of a group in one vector, without the loss scale."""
        pieces = []
        for k in group:
            grad, slot = grads[k], self.slots[k]
            flat = torch.zeros(slot.numel, dtype=slot.dtype, device=slot.device) if grad is None else grad.reshape(-1)
            pieces.append(flat.to(slot.compute_dtype))
        flat = torch.cat(pieces)
        return flat.div_(scale) if scale != 1.0 else flat

    def _decode(self, jobs: list[_Job], agreed: Agreed, grads: list[Tensor | None], scale: float) -> list[Tensor | None]:
        """Write the means into the gradients; make a gradient where only other workers had one."""
        for k, slot in enumerate(self.slots):
            if grads[k] is None and agreed.present[k]:
                grads[k] = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
        for job in jobs:
            assert job.result is not None
            targets = [grads[job.batch.slots[row]] for row in job.indices]
            job.batch.write(job.result.applied, targets, scale)
        for group, mean in zip(self._dense_groups(), agreed.dense, strict=True):
            scaled = mean * scale if scale != 1.0 else mean
            pieces = scaled.split([self.slots[k].numel for k in group])
            pairs = [(grad, piece) for k, piece in zip(group, pieces, strict=True) if (grad := grads[k]) is not None]
            if pairs:
                torch._foreach_copy_([g for g, _ in pairs], [piece.view(g.shape) for g, piece in pairs])
        return grads

    # ---------------------------------------------------------------- state

    def error_memory(self) -> dict[str, Tensor]:
        """Parameter name -> this worker's error, a live view in the parameter's shape; dense parameters are absent."""
        return {
            name: batch.memory.view(row, self.slots[batch.slots[row]].shape)
            for batch in self._batches
            for row, name in enumerate(batch.names)
        }

    def bases(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> state of the compressor by its symbol (Q), a copy as it is now."""
        return {
            name: {symbol: tensor[row].clone() for symbol, tensor in batch.state.items()}
            for batch in self._batches
            for row, name in enumerate(batch.names)
        }

    @torch.no_grad()
    def set_state(self, name: str, error: Tensor | None, state: Mapping[str, Tensor]) -> None:
        """Overwrite the error memory and the basis of one parameter, as read from a checkpoint."""
        self._settle_last_report()
        batch, row = self._place[name]
        if error is not None:
            memory = batch.memory.tensor
            memory[row] = error.to(memory).view(batch.m, batch.n)
        for symbol, value in state.items():
            batch.state[symbol][row] = value.to(batch.state[symbol])

    @torch.no_grad()
    def reset(self, names: Sequence[str] | None = None) -> None:
        """Back to the state before the first step: zero errors and initial bases, of all parameters and the step counter,
        or of the named parameters only."""
        if names is None:
            self._pending, names = None, list(self._place)
            self.continue_at(0)
        self._settle_last_report()
        initial: dict[int, dict[str, Tensor]] = {}
        for name in names:
            batch, row = self._place[name]
            state = initial.get(id(batch)) or initial.setdefault(id(batch), batch.initial_state())
            self.set_state(name, torch.zeros(batch.m, batch.n), {symbol: value[row] for symbol, value in state.items()})

    def continue_at(self, step: int) -> None:
        """The next pass is t = step, as read from a checkpoint."""
        self.step, self._ask_to_compare, self._consolidated_at = step, self._agreed, None

    @property
    def consolidated(self) -> bool:
        """Whether the error memory is the mean of all workers' errors since the last step."""
        return self._consolidated_at == self.step

    def mark_consolidated(self) -> None:
        """The error memory is the mean of all workers' errors, as that of a checkpoint which holds the mean."""
        self._consolidated_at = self.step

    def take_over(self, old: Reducer) -> None:
        """Go on with the state of a reducer of fewer parameters, on all workers alike."""
        bases = old.bases()
        for name, error in old.error_memory().items():
            self.set_state(name, error, bases[name])
        old._settle_last_report()
        self.ledger, self._worker, self._last, self._agreed = old.ledger, old._worker, old._last, old._agreed
        consolidated = old.consolidated
        self.continue_at(old.step)
        if consolidated:
            self.mark_consolidated()

    def _settle_last_report(self) -> None:
        """Before the error memory is changed by anything but a step: the last report's norms are of the memory as it is."""
        if self._last is not None:
            self._last.report(self._batches)

    @torch.no_grad()
    def consolidate_error_memory(self) -> None:
        """Every worker's error becomes the mean of all; a collective.

        Linear compressors use the mean error only, so training goes on as it would have (to round-off), and what any
        worker then saves is right for every worker at any world size. Called again before the next step, it does nothing.

        Raises:
            LowRankCommError: a pass is pending.
        """
        if self._pending is not None:
            raise LowRankCommError("consolidate_error_memory() within a step; call it after optimizer.step().")
        self._settle_last_report()
        if not self._agreed:
            self.agree()
        if self.consolidated:
            return
        self.mark_consolidated()
        if self.group.size == 1:
            return
        if not self.compressor.linear:
            _log.warning("%s is not linear: the mean error is a valid start, not an exact one", self.compressor.json_name)
        for batch in self._batches:
            total = batch.memory.tensor.to(device=batch.device, dtype=batch.dtype, copy=True)
            self.ledger.collectives += self.group.sum_([total])
            self.ledger.bytes["consolidation"] += total.nbytes
            batch.memory.store(total.div_(self.group.size), t=self.step, shared=True)

    def describe(self) -> dict[str, Any]:
        """Everything that must be equal on all workers."""
        return {
            **self._policy.describe(),
            "seed": self.seed,
            "wire_dtype": self._wire_name,
            "error_feedback": self._error_feedback.describe(),
            "initial_basis": self._initial_basis,
            "step": self.step,
            "parameters": {slot.name: f"#{k} {slot.shape} {slot.dtype}" for k, slot in enumerate(self.slots)},
        }

    # ---------------------------------------------------------------- reports

    @property
    def plan(self) -> Plan:
        """What goes low-rank, how many bytes that is, and what it costs in memory."""
        restart_every = self._schedule.restart_every if self._schedule else None
        idle = self._policy.idle_rules([slot.name for slot in self.slots])
        return make_plan(
            self.slots,
            self.treatments,
            self.compressor,
            self._batches,
            self.group.size,
            self._wire_dtype,
            restart_every,
            idle,
        )

    @property
    def last_report(self) -> StepReport | None:
        """The last pass; None before the first. Norms cost one read of the error memory, when this is first read."""
        return self._last.report(self._batches) if self._last else None

    def _enter_ledger(self, account: Account, jobs: list[_Job], applied: bool) -> None:
        restarts = sum(len(job.indices) for job in jobs if job.context.restart)
        full = sum(slot.numel * slot.dtype.itemsize for slot in self.slots)
        self._last = LastPass(self.step, applied, account, full, restarts)
        self.ledger.enter(account.bytes, account.collectives, full, applied)


def _digest(tensor: Tensor) -> str:
    """A short hash of the numbers, to be compared between workers."""
    return hashlib.sha256(repr(tensor.tolist()).encode()).hexdigest()[:16]


def _rows_of_result(result: Result, rows: list[int]) -> Result:
    """The result of some matrices of a batch."""

    def take(part: LowRank | Tensor) -> LowRank | Tensor:
        return LowRank(part.p[rows], part.q[rows]) if isinstance(part, LowRank) else part[rows]

    return Result(
        take(result.applied),
        take(result.sent),
        {symbol: tensor[rows] for symbol, tensor in result.state.items()},
        None if result.kept is None else result.kept[rows],
    )
