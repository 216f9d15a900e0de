"""`BidirectionalOptimizer`: a bidirectional method in a plain PyTorch training loop,
around any torch optimizer.

Every rank is a worker and trains the plain model; its parameters are this worker's own
point w_i, and differ from rank to rank. Rank 0 is the server too: it holds x, and the
base optimizer steps there and nowhere else, on x, with the method's estimate as the
gradient. The theory covers plain SGD only; Adam and others are offered because they
work in practice.

    loss.backward()      gradients at w_i; passes add up as usual
    optimizer.step()     uplink, the base's step on x, downlink; the parameters become the new w_i
    with optimizer.at_server_parameters(): evaluate, save the model
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_comm.bidirectional.base import Context, Method, State, drive
from lowrank_comm.bidirectional.config import check_seed, parse
from lowrank_comm.bidirectional.distributed import ProcessGroupTransport
from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.bidirectional.refusals import (
    guard_against_averaging,
    refuse_deepspeed,
    refuse_model,
)
from lowrank_comm.bidirectional.saved import KEY, Saved
from lowrank_comm.bidirectional.vectors import FlatParameters
from lowrank_comm.communication.agreement import check_same, fingerprint
from lowrank_comm.communication.group import LENGTH_BYTES, Group
from lowrank_comm.communication.workers import Workers
from lowrank_comm.config.enabled import leave_alone
from lowrank_comm.errors import ConfigError, StateMismatchError
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.optimizer.backward_hooks import BackwardWatch
from lowrank_comm.optimizer.grad_scaler import LossScaling
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.optimizer.step import StepLog, run_step
from lowrank_comm.optimizer.wrapper import OptimizerWrapper

_log = logging.getLogger("lowrank_comm")


class BidirectionalOptimizer(OptimizerWrapper):
    """A torch optimizer that steps on a server, with compressed messages in both
    directions.

    x+ = base's step from x with gradient g;  g and w_i+ as the method says

    Args:
        base: steps on x, on rank 0; e.g. `torch.optim.SGD(model.named_parameters(),
            lr=gamma)`, for which the theory holds.
        method: `InkheartSGD`, `M4` (both reconstructions of ours), `MarinaP` or `M3`.
        process_group: the workers: None for the default group, a `ProcessGroup` or a
            1-D `DeviceMesh`.
        seed: of the random draws, equal on all workers.
        named_parameters: names, where the base has none.

    Raises:
        ConfigError: a bad argument.
        UnsupportedError: an engine that needs the same weights on all ranks; see
            `refusals`.

    Example:
        >>> import torch
        >>> from lowrank_comm.bidirectional import BidirectionalOptimizer, InkheartSGD
        >>> model = torch.nn.Linear(8, 8)
        >>> base = torch.optim.SGD(model.named_parameters(), lr=0.1)
        >>> optimizer = BidirectionalOptimizer(base, InkheartSGD(uplink_fraction=0.5))
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.at_server_parameters():
        ...     loss = model(torch.ones(2, 8)).sum()

    Source: `Method.step`, with any base optimizer in the place of plain SGD.
    """

    # a GradScaler must call step() on every worker, also where it saw an overflow
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: Optimizer,
        method: Method,
        process_group: Any = None,
        seed: int = 0,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(base, "base")
        if not isinstance(method, Method):
            raise ConfigError(
                f"method must be one such as InkheartSGD(uplink_fraction=0.25), got {method!r}."
            )
        check_seed(seed)
        refuse_deepspeed()
        self.method, self.seed, self.t, self.ledger = method, seed, 0, LinkLedger()
        self._group, self._namer = Group(process_group), Namer(named_parameters)
        self._transport = ProcessGroupTransport(self._group, self.ledger)
        self._scaling, self._double_averaging = LossScaling(id(self)), guard_against_averaging()
        self._flat: FlatParameters | None = None
        self._state: State | None = None
        self._agreed = self._loaded = False
        self._step_log = StepLog("some worker's gradient was not finite")
        trainable = self._trainable()
        self._watch: BackwardWatch | None = BackwardWatch(trainable, self._new_gradient)

    @classmethod
    def from_config(
        cls, base: Optimizer, section: Mapping[str, Any], **keywords: Any
    ) -> BidirectionalOptimizer | Optimizer:
        """From a `lowrank_comm` section, as in a JSON file.

        Args:
            base: the base optimizer.
            section: see `config`.
            keywords: of the constructor, for what JSON cannot hold; they win over the
                section.

        Returns:
            The optimizer; `base` as it is where the section has "enabled": false.

        Raises:
            ConfigError: an unknown key, with the nearest valid one, or a value that
                cannot work.

        Example:
            >>> import torch
            >>> base = torch.optim.SGD(torch.nn.Linear(8, 8).named_parameters(), lr=0.1)
            >>> BidirectionalOptimizer.from_config(base, {"compressor": "m4", "uplink_fraction": 0.5}).method.uplink_fraction
            0.5
        """
        method, seed = parse(section)
        if section.get("enabled") is False:
            return leave_alone(base)
        return cls(base, method, **{"seed": seed, **keywords})

    def attach(self, model: nn.Module, scaler: Any = None) -> None:
        """Check that the model is a plain one, and take the parameters' names from it.
        Optional, but for a scaler.

        Args:
            model: whose parameters the base optimizes.
            scaler: a `torch.amp.GradScaler`, so that an overflow on one worker lowers
                the scale on all.

        Raises:
            UnsupportedError: the model is wrapped by an engine that needs the same
                weights on all ranks.
        """
        refuse_model(model)
        self._namer.learn(model.named_parameters())
        self._scaling.attach(scaler)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all workers, since some worker's
        gradient was not finite.
        """
        return self._step_log.skipped_in_a_row > 0

    @property
    def is_server(self) -> bool:
        """Whether this rank holds x."""
        return self._group.rank == 0

    def __repr__(self) -> str:
        return f"BidirectionalOptimizer({self.method!r}, {self.base!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, before the first step.

        Raises:
            ConfigError: after it.
        """
        if self._flat is not None:
            raise ConfigError(
                "parameters cannot be added once x and w_i exist; build a new optimizer with all of"
                " them."
            )
        super().add_param_group(param_group)

    # ---------------------------------------------------------------- a step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Uplink, the base's step on x, downlink. A collective, to be called by every
        worker.

        Args:
            closure: computes the loss and the gradients anew; it runs first.

        Returns:
            The closure's loss, or None.

        Raises:
            ConfigError: parameters or their number of workers cannot work; before any
                collective.
            ConfigMismatchError: at the first step, on every worker, if their settings
                or parameters differ.
            UnsupportedError: at the first step, on every worker, if an engine has
                averaged the gradients.
        """
        return run_step(
            self,
            self.param_groups,
            closure,
            self._scaling,
            initialise=self.base.step,
            average=self._exchange,
            update=self._move_to,
        )

    def _exchange(self) -> State | None:
        """Uplink, the base's step on x, downlink; None if the step is vetoed."""
        flat = self._prepared()
        gradients = flat.gradients()
        self._agree(gradients)
        assert self._state is not None
        with full_precision(flat.device):
            state = drive(
                self.method,
                self._state,
                gradients[None],
                self._context(),
                self._transport,
                self._descend,
            )
        self._step_log.enter(self.t, state is not None, [gradients])
        self.ledger.close(state is not None)
        return state

    def _move_to(self, state: State) -> None:
        """Take the state over; the parameters become the new w_i."""
        self._state, self.t = state, self.t + 1
        self._prepared().write(self.method.points(state)[0])

    def _new_gradient(self, parameter: Tensor) -> None:
        self._double_averaging.gradient()

    def _descend(self, estimate: Tensor) -> Tensor:
        """The base's step from x; the parameters serve as its place to work, and get
        w_0 at the end of the step.
        """
        assert self._flat is not None and self._state is not None
        flat, local = self._flat, [p.grad for p in self._flat.parameters]
        flat.write(self._state["x"])
        flat.write_gradients(estimate)
        self.base.step()
        for parameter, gradient in zip(flat.parameters, local, strict=True):
            parameter.grad = gradient
        return flat.read()

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _prepared(self) -> FlatParameters:
        """The parameters as a vector; at the first call also w_i = x = the parameters'
        values.
        """
        trainable = self._trainable()
        if self._flat is None:
            flat = FlatParameters(
                [
                    (name, p)
                    for name, p in self._namer.name_all(self.param_groups)
                    if p.requires_grad
                ]
            )
            self.method.groups(self._group.size)
            self._flat = flat
            self._state = self.method.start(flat.read(), self._context())
        elif [id(p) for p in trainable] != [id(p) for p in self._flat.parameters]:
            raise ConfigError(
                "the trainable parameters are not those of the first step; x and w_i have their"
                " coordinates. Freeze and unfreeze before it, or build a new optimizer."
            )
        return self._flat

    def _context(self) -> Context:
        assert self._flat is not None
        rank, device = self._group.rank, self._flat.device
        return Context(
            self.seed, self.t, self._group.size, self._flat.d, (rank,), rank == 0, device
        )

    def _agree(self, gradients: Tensor) -> None:
        """At the first step: settings and parameters are the same on all workers, and
        gradients each one's own.
        """
        if self._agreed:
            return
        flat = self._flat
        assert flat is not None
        description: dict[str, Any] = {
            "method": self.method.describe(),
            "seed": self.seed,
            "optimizer": type(self.base).__name__,
            "parameters": dict(
                zip(flat.names, (list(p.shape) for p in flat.parameters), strict=True)
            ),
            "step": self.t,
        }
        if not self._loaded:
            same = (
                "values of the parameters (seed all workers alike, or broadcast the parameters from"
                " rank 0)"
            )
            description[same] = fingerprint(flat.parameters)
        self.ledger.bytes["start"] += check_same(description, self._group, flat.device)
        workers = Workers(self._group, device=flat.device)
        self.ledger.bytes["start"] += self._double_averaging.check([gradients], workers)
        self._agreed = True
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    # ---------------------------------------------------------------- x, and the state

    def _server_vector(self) -> Tensor:
        flat, state = self._prepared(), self._state
        assert state is not None
        if self._group.size == 1 or self.t == 0:
            return state["w"][0] if "x" not in state else state["x"]
        return self._transport.from_server(
            state.get("x", torch.empty_like(state["w"][0])).to(flat.device), "asked"
        )

    def server_parameters(self) -> dict[str, Tensor]:
        """x, by parameter name; a collective (x travels to every worker).

        Returns:
            Parameter name -> tensor in the parameter's shape and dtype, the same bits
            on all workers.
        """
        return {
            name: tensor.clone()
            for name, tensor in self._prepared().shaped(self._server_vector()).items()
        }

    @contextlib.contextmanager
    def at_server_parameters(self) -> Iterator[None]:
        """Inside, the model's parameters are x on all workers, for evaluation and for
        saving it; a collective on entry.

        Raises:
            ConfigError: see `step`.
        """
        flat, x = self._prepared(), self._server_vector()
        own = flat.read()
        flat.write(x)
        try:
            yield
        finally:
            flat.write(own)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's state dict with this worker's state (and on rank 0 the server's);
        never communicates.

        Every rank saves its own, for instance by `torch.save(...,
        f"optimizer_{rank}.pt")`. With rank 0's alone, or at another number of workers,
        a run resumes too, but not exactly; see `load_state_dict`.
        """
        return self._state_dict_with_hooks(self._saved)

    def _saved(self) -> dict[str, Any]:
        result = self.base.state_dict()
        if self._state is not None and self._flat is not None:
            shapes = {
                name: list(p.shape)
                for name, p in zip(self._flat.names, self._flat.parameters, strict=True)
            }
            rank, n = self._group.rank, self._group.size
            result[KEY] = Saved(
                self.method.json_name, self.seed, self.t, rank, n, shapes, dict(self._state)
            ).as_dict()
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base, x and w_i, and write w_i into the parameters. A collective,
        to be called by every worker.

        If every worker has loaded what it saved itself at this number of workers, the
        run goes on bit by bit. Otherwise the workers start at rank 0's x: w_i = x, for
        M4 with v_i = y_i = y_bar. That is always valid, and not the same run.

        Args:
            state_dict: from `state_dict()`: each rank its own, or all of them rank 0's.

        Raises:
            StateMismatchError: on all workers, if it does not fit some of them; nothing
                is changed then.
        """
        self._load_with_hooks(state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        flat = self._prepared()
        saved, problem = Saved.find(state_dict, self.method, flat, self.is_server)
        exact = saved is not None and (saved.rank, saved.n) == (self._group.rank, self._group.size)
        server = [
            name for name in self.method.server_state if saved is not None and name in saved.tensors
        ]
        mine: dict[str, Any] = {
            "problem": problem,
            "plain": saved is None,
            "exact": exact,
            "server": server,
        }
        if saved is not None:
            mine |= {"t": saved.t, "seed": saved.seed}
        told = [
            json.loads(part)
            for part in self._group.gather_bytes(json.dumps(mine).encode(), flat.device)
        ]
        self.ledger.bytes["start"] += LENGTH_BYTES + len(json.dumps(mine))
        for rank, other in enumerate(told):
            if other["problem"]:
                raise StateMismatchError(f"rank {rank}: {other['problem']}")
            if other["plain"] != told[0]["plain"]:
                raise StateMismatchError(
                    f"rank 0 and rank {rank} have loaded different kinds of state dict, one of a"
                    " plain optimizer and one of a BidirectionalOptimizer; load the same kind on"
                    " all ranks."
                )
        plain = {key: value for key, value in state_dict.items() if key != KEY}
        # The base steps on rank 0 only; its state would be dead weight elsewhere.
        self.base.load_state_dict(
            plain if self.is_server or saved is None else {**plain, "state": {}}
        )
        self._agreed = False
        if saved is None:
            self._state = self.method.start(flat.read(), self._context())
            self.t = 0
            self._loaded = False
        else:
            self.t, self.seed, self._loaded = told[0]["t"], told[0]["seed"], True
            alike = all(
                other["exact"] and other["t"] == self.t and other["seed"] == self.seed
                for other in told
            )
            here = {name: tensor.to(flat.device) for name, tensor in saved.tensors.items()}
            self._state = here if alike else self._rejoined(here, told[0]["server"], flat)
            flat.write(self.method.points(self._state)[0])

    def _rejoined(self, here: State, names: list[str], flat: FlatParameters) -> State:
        """The state from what rank 0 holds; a collective."""
        like = torch.empty(flat.d, dtype=flat.dtype, device=flat.device)
        server = {
            name: self._transport.from_server(here[name] if self.is_server else like, "start")
            for name in names
        }
        if self.is_server:
            _log.warning(
                "the workers start anew at the server's x: the state was not saved by these very"
                " workers"
            )
        return self.method.rejoin(server, self._context())
