"""What a compressor is: pure maths that asks for averages, written as a generator.

A compressor never sees a process group. `step` is handed a batch of same-shape matrices
`Delta` (B, m, n), this worker's gradient plus its error memory, and the state of that
batch. It yields requests (see `requests`) and is sent the answers:

    Mean(x)            (mean, own): x averaged over the workers; this worker's x as sent
    ComputeOnce(...)   a tensor that one worker computes, with the same bits for all
    Gather(x)          x of every worker, in their order, as sent
    Decide(x, limit)   bool: whether all x are above a limit, for the host
    Read(x)            numbers on the device, equal on all workers, for the host
    InverseFactor(g)   (W, pivot): the factors of Gram matrices
    SumOverRows(x)     x summed over the blocks of rows in which a node holds matrices
    WholeRows(x)       all rows of x, of which this rank holds a block

and it returns a `Result`. A driver (the reducer over a process group, the simulation of
N workers in one process) answers the requests of all batches together, so that one
phase of all matrices is one collective. The same definition therefore serves every
engine, the simulation, and the ledger that counts bytes.

A worker may be a node whose ranks hold its matrices in blocks of rows. Delta, and P =
Delta Q, are then the rows of one rank, and a product that contracts over rows (P^T P,
Delta^T P) is a part of a sum: ask for `Mean(x, over_rows=True)` or `SumOverRows(x)`. A
compressor that does so sets `row_blocks`, and equals its unsharded self.

Rules that make this correct:
- A decision is taken from averaged or gathered values, or from (seed, name, t), never
  from what only this worker knows.
- `Result.applied` is built from the answers of collectives only, so that it has the
  same bits on all workers.
- The state is never changed in place: the result carries the next one, and it takes
  effect when the step is committed.
"""

from __future__ import annotations

import abc
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lowrank_comm.compressors.known_means import step_on_mean
from lowrank_comm.compressors.requests import Request
from lowrank_comm.compressors.restart_schedule import RestartHistory, RestartSchedule, staggered
from lowrank_comm.numerics.device import on_accelerator
from lowrank_comm.numerics.randomness import gaussian, uniform
from lowrank_comm.options import PositiveInt, check_options


@dataclass(frozen=True)
class LowRank:
    """The batch P Q^T in factors. p: (B, m, r), q: (B, n, r)."""

    p: Tensor
    q: Tensor

    def dense(self) -> Tensor:
        """Return P Q^T, (B, m, n)."""
        return self.p @ self.q.mT

    def __getitem__(self, rows: list[int] | slice | Tensor) -> LowRank:
        """Return some matrices of the batch, as of a tensor."""
        return LowRank(self.p[rows], self.q[rows])


@dataclass(frozen=True)
class Result:
    """What one compressed step of a batch agreed on.

    Attributes:
        applied: the approximation of the mean of Delta that every worker applies; the
            same bits on all workers.
        sent: this worker's contribution C(Delta_i); its mean over the workers is
            `applied`, and Delta - sent is the next error memory. None in a step of the
            warm-up, which has `kept` and `norms` in its place.
        state: next state of the batch, tensors with leading dimension B.
        kept: the next error memory itself, where it is not Delta - sent (a restart that
            makes it equal on all workers).
        norms: ||sent|| and ||Delta|| of the batch, where these are let go.
    """

    applied: LowRank | Tensor
    sent: LowRank | Tensor | None
    state: dict[str, Tensor]
    kept: Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None

    def copied_out(self) -> Result:
        """Return the result without views of anything larger, which they would keep in
        memory, such as the buffer of a packet.
        """
        state = {symbol: _copied_out(tensor) for symbol, tensor in self.state.items()}
        kept = None if self.kept is None else _copied_out(self.kept)
        sent = None if self.sent is None else _copied_out(self.sent)
        return Result(_copied_out(self.applied), sent, state, kept, self.norms)


Part = TypeVar("Part", LowRank, Tensor, LowRank | Tensor)


def _copied_out(part: Part) -> Part:
    if isinstance(part, LowRank):
        return LowRank(_copied_out(part.p), _copied_out(part.q))
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


class Delta:
    """The matrices to be compressed, (B, m, n): this worker's gradients plus its
    errors. Never changed by a compressor.

    Compressors ask for products, so that a subclass may form Delta on the way through
    the first of them (see `reduction.batches`).

    Args:
        tensor: (B, m, n).
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def tensor(self) -> Tensor:
        """The matrices themselves, (B, m, n)."""
        return self._tensor

    @property
    def shape(self) -> torch.Size:
        """(B, m, n), without forming them."""
        return self._tensor.shape

    @property
    def like(self) -> Tensor:
        """An empty tensor of their dtype and device."""
        return self._tensor.new_empty(0)

    def times(self, q: Tensor) -> Tensor:
        """Return Delta Q, (B, m, r). q: (B, n, r)."""
        return self.tensor @ (q if on_accelerator(q.device) else columns_in_memory(q))

    def transposed_times(self, p: Tensor) -> Tensor:
        """Return Delta^T P, (B, n, r). p: (B, m, r)."""
        return transposed_product(self.tensor, p)


def columns_in_memory(q: Tensor) -> Tensor:
    """Return q, (B, n, r), laid out column after column.

    matrix @ Q then reads rows of the matrix and columns of Q as they lie, which takes a
    CPU a quarter of the time at r = 4.
    """
    return q.mT.contiguous().mT


def transposed_product(matrix: Tensor, p: Tensor) -> Tensor:
    """Return matrix^T P, (B, n, r). On a CPU it is formed as (P^T matrix)^T: reading a
    matrix along its rows is up to three times as fast. An accelerator does not care,
    and the result lies as it goes on the wire.
    """
    return matrix.mT @ p if on_accelerator(p.device) else (p.mT @ matrix).mT


Form = Literal["ef14", "ef21", "ef21_sgdm", "none"]
"""Of error feedback; see `error_feedback.options`."""
State = dict[str, Tensor]
Steps = Generator[Request, Any, Result]


@dataclass(frozen=True)
class Context:
    """What a compressor may know of a batch beside the matrices themselves.

    Attributes:
        names: parameter names, one for each matrix.
        t: step, from 0.
        seed: of the run, equal on all workers.
        rank: r of these matrices, already cut to min(m, n).
        restart: whether these matrices restart in this step.
        warmup: whether they are averaged whole in this step; see `warmup`.
        variant: the compressor's `variant` for them, the same for all.
        wire_rounds: whether the wire dtype is narrower than the dtype of the
            computation.
        m: rows of the whole matrices.
        rows: those of them that this rank holds.
        in_blocks: whether the ranks of a node hold the matrices in blocks of rows.
        round: of several on what is left of the same matrices, each with draws of its
            own; see `error_feedback.rounds`.
        worker: this worker's number, from 0; for private draws and for its own part of
            a gathered answer only.
        workers: N.
    """

    names: tuple[str, ...]
    t: int
    seed: int
    rank: int
    restart: bool = False
    warmup: bool = False
    variant: int = 0
    wire_rounds: bool = False
    m: int = 0
    rows: slice = field(default_factory=lambda: slice(None))
    in_blocks: bool = False
    round: int = 0
    worker: int = 0
    workers: int = 1

    def only(self, rows: Sequence[int]) -> Context:
        """Return the context of some matrices of the batch."""
        return replace(self, names=tuple(map(self.names.__getitem__, rows)))

    def draw(
        self, purpose: str, shape: tuple[int, ...], like: Tensor, private: bool = False
    ) -> Tensor:
        """Draw a Gaussian (B, *shape) from (seed, name, t, purpose), equal on all
        workers, in dtype and device of `like`; `private`: another on each worker.
        """
        return gaussian(*self._key(purpose, private), shape, like.dtype, like.device)

    def uniform(
        self, purpose: str, shape: tuple[int, ...], like: Tensor, private: bool = False
    ) -> Tensor:
        """Draw the same, uniform in [0, 1)."""
        return uniform(*self._key(purpose, private), shape, like.dtype, like.device)

    def _key(self, purpose: str, private: bool) -> tuple[int, tuple[str, ...], int, str]:
        """Return (seed, names, t, purpose) of a draw."""
        purpose = f"{purpose} of round {self.round}" if self.round else purpose
        purpose = f"{purpose} of worker {self.worker}" if private else purpose
        return self.seed, self.names, self.t, purpose


@dataclass(frozen=True)
class Compressor(abc.ABC):
    """Compresses batches of matrices on their way to their average. Immutable: the
    driver holds the state. Its options are its fields; their types are checked.

    Args:
        rank: r of the factors; cut to min(m, n) matrix by matrix.

    Class attributes:
        json_name: name in configuration files.
        linear: C(sum of Delta_i) = sum of C(Delta_i) at a shared state, so that only
            the mean error matters and a checkpoint of the mean resumes exactly at any
            world size.
        low_rank: False for compressors that leave every matrix dense.
        row_blocks: it may be given matrices in blocks of rows; see the module's text.
        contractive: E||C(Delta) - Delta||^2 <= (1 - delta) ||Delta||^2, delta > 0, at
            every step or at restarts, and with delta >= 0 in between: what error
            feedback needs.
        restart_every: tau in steps; None for compressors without restarts.
        stagger: the restarts of the matrices are spread over the period.
        private: symbols of the state that differ between workers; all others have the
            same bits on all.
        parameter_shaped_state: symbols of the state that are of the matrix element by
            element, as its error is: checkpoints keep them whole, as they keep errors,
            so that they fit any blocks of rows that a rank holds.
        replicated_state: symbols of the state that are equal for all blocks of rows of
            a parameter.
        projects: what is sent is LowRank(P, Q_i) with P orthonormal and Q_i = Delta_i^T
            P, in every step, so that norms follow from Q_i and the error.
        tracks: what is applied is an estimate that all know, of which the step's
            message is the change.
        gathers: what it sends is gathered and not averaged: each worker receives N - 1
            times as much.
        whole_restarts: a restart sends the whole matrix, and its state serves every one
            of `error_feedback.rounds`.
        follows_means: it has a warm start, and a step on means that are known anyway
            gives it a basis for the next one (`warmup`); else the first step after the
            warm-up is a restart.
        warms_up: whether the warm-up averages its matrices whole; False for what is
            exact by itself.
    """

    rank: PositiveInt = 4

    json_name: ClassVar[str]
    linear: ClassVar[bool] = True
    low_rank: ClassVar[bool] = True
    row_blocks: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    private: ClassVar[tuple[str, ...]] = ()
    parameter_shaped_state: ClassVar[tuple[str, ...]] = ()
    replicated_state: ClassVar[tuple[str, ...]] = ()
    projects: ClassVar[bool] = False
    tracks: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    whole_restarts: ClassVar[bool] = False
    follows_means: ClassVar[bool] = False
    warms_up: ClassVar[bool] = True
    # Not annotated: dataclass would give the settings of these names another place.
    restart_every = None  # type: int | None
    stagger = False

    def __post_init__(self) -> None:
        check_options(self, f"{type(self).__name__}: ")

    @property
    def unbiased(self) -> bool:
        """Whether E C(Delta) = Delta; such a compressor needs no error feedback."""
        return not self.contractive

    @property
    def feedback(self) -> Form:
        """The form of error feedback unless another one is asked for; see
        `error_feedback.ef21`.
        """
        return "ef14" if self.contractive else "none"

    @property
    def averages_restarts(self) -> bool:
        """Whether a restart sends an average of its own, of the kind "restart"."""
        return self.restart_every is not None

    @abc.abstractmethod
    def elements(self, m: int, n: int, r: int) -> int:
        """Count the elements that a worker hands to the collectives in an ordinary step
        for one m x n matrix at rank r; their mean, where these steps differ.
        """

    @abc.abstractmethod
    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        """Return the generator of one step of a batch; the module's docstring tells its
        protocol.
        """

    def follow(
        self, mean: Tensor, own: Tensor, state: State, context: Context
    ) -> Generator[Request, Any, State]:
        """Return the generator of the next state after a step that has averaged the
        matrices whole.

        Args:
            mean: (B, m, n), or this rank's rows of it, equal on all workers.
            own: what this worker sent of its own.
            state, context: as in `step`.
        """
        if not self.follows_means:
            return {}
        return (yield from step_on_mean(self.step(Delta(mean), state, context))).state

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        """Return the state before the first step: tensors of leading dimension B, in
        dtype and device of `like`; none unless a compressor has a state.
        """
        return {}

    def restart_elements(self, m: int, n: int, r: int) -> int:
        """Count the elements of a step with a restart; their mean, where restarts
        differ.
        """
        return self.elements(m, n, r)

    def restart_rule(self, m: int, n: int) -> tuple[str, str]:
        """Return by which of several rules an m x n matrix restarts, and what decides
        that, for the plan: ("svd", "of at most 2^20 elements"); empty where nothing is
        to be said.
        """
        return "", ""

    def variant(self, history: RestartHistory, restart: bool) -> int:
        """Return the index of the step's kind, or of the restart's, for a compressor
        that alternates.

        It follows from a matrix's history and not from t, since in some steps no worker
        may have a gradient for it. Matrices of one shape whose variants differ make
        their steps apart.
        """
        return 0

    def elements_in(self, m: int, n: int, r: int, variant: int, restart: bool) -> int:
        """Count the elements of a step of this variant exactly."""
        return self.restart_elements(m, n, r) if restart else self.elements(m, n, r)

    def schedule(self, costs: dict[str, int], warmup_steps: int = 0) -> RestartSchedule | None:
        """Return when each parameter restarts; None for compressors without restarts.

        Args:
            costs: parameter name -> elements of its restart.
            warmup_steps: in which nothing restarts.
        """
        if self.restart_every is None:
            return None
        schedule = staggered(self.restart_every, costs if self.stagger else {})
        tracked = warmup_steps > 0 and self.follows_means
        return replace(schedule, first=warmup_steps, restarts_first=not tracked)

    def describe(self) -> dict[str, Any]:
        """Return plain settings by name, compared between workers at the first step
        and written into checkpoints.
        """
        return {"compressor": self.json_name} | asdict(self)

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the settings, as in configuration files."""
        return [option.name for option in fields(cls)]
