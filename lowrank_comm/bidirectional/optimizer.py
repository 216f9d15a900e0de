"""`BidirectionalOptimizer`: a bidirectional method in a plain PyTorch training loop,
around any torch optimizer.

Every rank is a worker and trains the plain model; its parameters are this worker's own
point w_i, and differ from rank to rank. Rank 0 is the server too: it holds x, and the
base optimizer steps there only, on x, with the method's estimate as the gradient. The
theory covers plain SGD only; Adam and others are offered because they work in practice.

    loss.backward()      gradients at w_i; passes add up as usual
    optimizer.step()     uplink, the base's step on x, downlink; the parameters become
                         the new w_i
    with optimizer.at_server_parameters(): evaluate, save the model
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_comm.bidirectional.base import Method, State
from lowrank_comm.bidirectional.config import parse
from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.bidirectional.party import Party
from lowrank_comm.bidirectional.refusals import (
    guard_against_averaging,
    refuse_deepspeed,
    refuse_model,
)
from lowrank_comm.bidirectional.saved import KEY, agree_on_saved, refuse_loaded_gradients
from lowrank_comm.bidirectional.vectors import FlatParameters
from lowrank_comm.communication.group import Group
from lowrank_comm.communication.workers import Workers
from lowrank_comm.config.enabled import leave_alone
from lowrank_comm.errors import ConfigError
from lowrank_comm.optimizer.backward_hooks import BackwardWatch
from lowrank_comm.optimizer.grad_scaler import LossScaling
from lowrank_comm.optimizer.parameter_names import Namer, keeping_names
from lowrank_comm.optimizer.step import run_step
from lowrank_comm.optimizer.wrapper import OptimizerWrapper, refuse_meta
from lowrank_comm.options import Seed, check
from lowrank_comm.reduction.gradients import refuse
from lowrank_comm.reduction.skipped_steps import SkippedSteps, unsound_gradients


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

    method: Method
    ledger: LinkLedger

    # a GradScaler must call step() on every worker, also where it saw an overflow
    _step_supports_amp_scaling = True
    # by `checkpoint.save_all`: each rank's state is another one
    saves_each_rank = True

    def __init__(
        self,
        base: Optimizer,
        method: Method,
        process_group: Any = None,
        seed: int = 0,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(base, "base")
        refuse_loaded_gradients(base)
        if not isinstance(method, Method):
            raise ConfigError(
                f"method must be one such as InkheartSGD(uplink_fraction=0.25), got {method!r}."
            )
        check("seed", seed, Seed)
        refuse_deepspeed(self)
        # not by assignment, which would reach a base that has attributes of these names
        vars(self).update(method=method, ledger=LinkLedger())
        self._seed = seed
        self._workers = Workers(Group(process_group))
        self._party: Party | None = None
        self._namer = Namer(named_parameters)
        self._scaling = LossScaling(id(self))
        self._double_averaging = guard_against_averaging()
        self._skipped = SkippedSteps("some worker's gradient was not finite")
        self._watch = BackwardWatch(self._trainable(), self._new_gradient)

    @classmethod
    def from_config(
        cls, base: Optimizer, section: Mapping[str, Any], **keywords: Any
    ) -> BidirectionalOptimizer | Optimizer:
        """Build the optimizer from a `lowrank_comm` section, as in a JSON file.

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
            >>> section = {"compressor": "m4", "uplink_fraction": 0.5}
            >>> BidirectionalOptimizer.from_config(base, section).method.uplink_fraction
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
    def workers(self) -> Workers:
        """The ranks that train together."""
        return self._workers

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all workers, since some worker's
        gradient was not finite.
        """
        return self._skipped.in_a_row > 0

    @property
    def is_server(self) -> bool:
        """Whether this rank holds x."""
        return self._workers.group.rank == 0

    @property
    def t(self) -> int:
        """Steps made so far."""
        return self._party.t if self._party is not None else 0

    @property
    def seed(self) -> int:
        """Seed of the random draws; after a load, the saved run's."""
        return self._party.seed if self._party is not None else self._seed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r}, {self.base!r})"

    def _of_the_base(self, name: str, value: Any) -> Any:
        if name in ("first_step", "second_step"):
            raise AttributeError(
                f"{type(self).__name__}: {name}() would step on each worker's own gradient; the"
                " base steps on the server, in step()."
            )
        # schedule-free optimizers change the parameters when they change their mode
        return functools.partial(self._at_x, value) if name in ("train", "eval") else value

    def _at_x(self, change: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the base that may change the parameters: x on the server,
        and nothing elsewhere.
        """
        if self._party is None:
            return change(*args, **kwargs)
        flat, own = self._party.flat, self._party.flat.read()
        if self.is_server:
            flat.write(self._party.state["x"])
        result = change(*args, **kwargs)
        if self.is_server:
            self._party.state["x"] = flat.read()
        flat.write(own)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, before the first step.

        Raises:
            ConfigError: after it.
        """
        if self._party is not None:
            raise ConfigError(
                "parameters cannot be added once x and w_i exist; build a new optimizer with all of"
                " them."
            )
        super().add_param_group(param_group)

    # ---------------------------------------------------------------- a step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step: uplink, the base's step on x, downlink. A collective, to be
        called by every worker.

        Args:
            closure: computes the loss and the gradients; it runs first.

        Returns:
            The closure's loss, or None.

        Raises:
            ConfigError: parameters or their number of workers cannot work; before any
                collective.
            ConfigMismatchError: at the first step, on every worker, if their settings
                or parameters differ.
            UnsupportedError: at the first step, on every worker, if an engine has
                averaged the gradients.
            LowRankCommError: on the other workers, if the base has raised on rank 0,
                where its own error is raised.
        """
        return run_step(
            self,
            closure,
            self._scaling,
            initialise=self._step_base,
            average=self._exchange,
            update=lambda state: self._prepared().move_to(state),
        )

    def _exchange(self) -> State | None:
        """Run uplink, the base's step on x, and downlink; return the next state, None
        if the step is vetoed.
        """
        party = self._prepared()
        gradients = party.flat.gradients()
        if not self._workers.agreed:
            self.ledger.bytes["start"] += self._double_averaging.check([gradients], self._workers)
            party.agree(type(self.base).__name__, self.param_groups)
            self._watch.remove()
        state = party.exchange(gradients, self._descend)
        bad = ""
        if state is None:
            refuse(self._workers, party.flat.unusable_gradients().values())
            bad = unsound_gradients(self._namer.name_all(self.param_groups), party.state)
        self._skipped.enter(self.t, state is not None, [gradients], self._workers, bad)
        return state

    def _new_gradient(self, parameter: Tensor) -> None:
        self._double_averaging.gradient()

    def _descend(self, estimate: Tensor) -> Tensor:
        """Let the base step from x, and return x+. The step is made in the parameters,
        which get w_0 at the end of it, or at once if the base raises.
        """
        party = self._prepared()
        flat, local = party.flat, [p.grad for p in party.flat.parameters]
        own = flat.read()
        flat.write(party.state["x"])
        flat.write_gradients(estimate)
        try:
            self._step_base()
            return flat.read()
        except BaseException:
            flat.write(own)
            raise
        finally:
            for parameter, gradient in zip(flat.parameters, local, strict=True):
                parameter.grad = gradient

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _prepared(self) -> Party:
        """Return this rank's party. The first call makes it, with w_i = x = the
        parameters' values.
        """
        if self._party is None:
            named = self._namer.name_all(self.param_groups)
            refuse_meta(named)
            flat = FlatParameters([(name, p) for name, p in named if p.requires_grad])
            self._party = Party(self.method, self._seed, flat, self._workers, self.ledger)
        elif [id(p) for p in self._trainable()] != [id(p) for p in self._party.flat.parameters]:
            raise ConfigError(
                "the trainable parameters are not those of the first step; x and w_i have their"
                " coordinates. Freeze and unfreeze before it, or build a new optimizer."
            )
        return self._party

    # ---------------------------------------------------------------- x, and the state

    def server_parameters(self) -> dict[str, Tensor]:
        """Return x by parameter name; a collective (x is sent to every worker).

        Returns:
            Parameter name -> tensor in the parameter's shape and dtype, the same bits
            on all workers.
        """
        party = self._prepared()
        shaped = party.flat.shaped(party.server_vector())
        return {name: tensor.clone() for name, tensor in shaped.items()}

    @contextlib.contextmanager
    def at_server_parameters(self) -> Iterator[None]:
        """Put x into the model's parameters on all workers inside the block, for
        evaluation and for saving; a collective on entry.

        Raises:
            ConfigError: see `step`.
        """
        party = self._prepared()
        flat, x = party.flat, party.server_vector()
        own = flat.read()
        flat.write(x)
        try:
            yield
        finally:
            flat.write(own)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base's state dict with this worker's state (and on rank 0 the
        server's); no communication.

        Every rank saves its own, for instance by `torch.save(...,
        f"optimizer_{rank}.pt")`. With rank 0's alone, or at another number of workers,
        a run resumes too, but not exactly; see `load_state_dict`.
        """
        return self._state_dict_with_hooks(self._saved)

    def _saved(self) -> dict[str, Any]:
        result = self.base.state_dict()
        if self._party is not None:
            result[KEY] = self._party.saved()
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
        party = self._prepared()
        shapes = party.flat.shapes
        agreed = agree_on_saved(state_dict, self.method, shapes, self._workers, self.ledger)
        plain = {key: value for key, value in state_dict.items() if key != KEY}
        if agreed is not None and not self.is_server:
            # the base steps on rank 0 only; its state is not used elsewhere
            plain["state"] = {}
        self.base.load_state_dict(keeping_names(plain, self.base.param_groups))
        party.restore(agreed)
