"""Which compressor serves which parameter, with what is put around it: the policy's
decision, together with the form of error feedback, the formats of quantization, and the
blocks of rows that a node's ranks hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_comm.communication import IntraNodeGroup
from lowrank_comm.compressors.base import Compressor, Context
from lowrank_comm.compressors.quantized import Quantized
from lowrank_comm.compressors.row_sparse import RowSparse
from lowrank_comm.error_feedback.ef21 import with_feedback
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.numerics.quantization import FormatName, Quantization
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.policy import Policy, Rule, Treatment


class CompressorAssignment:
    """The treatment of every parameter, and the compressor that carries it out.

    Args:
        compressor: of the low-rank parameters.
        min_compression_rate, rules: see `policy`.
        error_feedback: its form, and how errors are kept.
        quantization: what is sent quantized.
        intra_node: the ranks of this node.
        seed: of the draws.

    Attributes:
        linear: whether only the mean error of low-rank parameters matters: the
            compressor is linear, and nothing that it averages is quantized.
        low_rank_compressor: the compressor, with its rounds and EF21 around it.

    Raises:
        ConfigError: an argument is of the wrong kind, or does not suit the compressor.
        UnsupportedError: it cannot be carried out on blocks of whole matrices, and it
            is to be.
    """

    def __init__(
        self,
        compressor: Compressor,
        min_compression_rate: float,
        rules: Sequence[Rule],
        error_feedback: ErrorFeedback | None,
        quantization: Quantization | None,
        intra_node: IntraNodeGroup,
        seed: int,
    ) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ConfigError(
                    "rules must hold Rule objects such as"
                    f' Rule("lm_head.*", treatment="dense"), got {rule!r}.'
                )
        _check_kind("error_feedback", error_feedback, ErrorFeedback, "form", "ef14")
        _check_kind("quantization", quantization, Quantization, "dense", "int8")
        self.quantization = quantization or Quantization()
        self.error_feedback = (error_feedback or ErrorFeedback()).for_compressor(compressor)
        self.linear = compressor.linear and not self.quantization.of_compressors
        self.compressor = compressor
        self.low_rank_compressor = with_feedback(compressor, self.error_feedback, self.linear)
        self.policy = Policy(
            self.low_rank_compressor, min_compression_rate, tuple(rules), self.quantization.dense
        )
        self._intra_node, self._seed = intra_node, seed
        self._check_codes()
        self._check_effect()
        if intra_node.whole_matrices:
            self._check_whole_matrices()

    def _check_effect(self) -> None:
        """Refuse an option of the compressor to which the form of error feedback leaves
        nothing to do.
        """
        form = self.error_feedback.form
        rounds = self.error_feedback.rounds
        options = self.compressor.describe()
        if options.get("consensus_restart") and form != "ef14":
            raise ConfigError(
                "consensus_restart=True is about the error memory, which"
                f' error_feedback.form="{form}" does not have; leave consensus_restart out, or use'
                ' error_feedback.form="ef14".'
            )
        for key in ("exact_restart", "apply_full"):
            if options.get(key) and rounds > 1:
                raise ConfigError(
                    f"{key}=True sends the whole matrix at a restart, and leaves nothing to"
                    f" error_feedback.rounds={rounds}, whose further rounds would find no subspace;"
                    f" leave {key} out, or use rounds=1."
                )

    def _check_codes(self) -> None:
        """Refuse quantization that would have no effect, or a bias that nothing takes
        back.
        """
        codes, name = self.quantization, self.compressor.json_name
        if not codes.of_compressors:
            return
        key, word = ("factors", codes.factors) if codes.factors else ("restart", codes.restart)
        if not self.compressor.low_rank:
            raise ConfigError(
                f"quantization.{key}={word!r} has no meaning for {name}, which leaves every matrix"
                f" dense; use quantization.dense={word!r}."
            )
        if codes.restart and not (self.compressor.averages_restarts or self.compressor.gathers):
            raise ConfigError(
                f"quantization.restart={codes.restart!r} has no meaning for {name} as it is set,"
                " whose restarts send nothing of their own; leave it out."
            )
        if self.compressor.gathers:
            raise ConfigError(
                f"quantization.{key}={word!r} has no meaning for {name}, whose factors are gathered"
                " and not averaged; leave it out (quantization.dense is possible), or use another"
                " compressor."
            )
        if self.error_feedback.form == "none" and codes.rounding == "nearest":
            raise ConfigError(
                f'quantization.rounding="nearest" is biased, and {name} without error feedback'
                ' would never make up for it; use quantization.rounding="stochastic", or'
                ' error_feedback.form="ef14".'
            )

    def _check_whole_matrices(self) -> None:
        what = None
        if not self.compressor.row_blocks:
            what = f"{self.compressor.json_name}, whose steps need whole matrices"
        elif self.low_rank_compressor is not self.compressor:
            what = (
                f"error_feedback {asdict(self.error_feedback)}, which is formed around whole"
                " matrices"
            )
        elif any(rule.treatment == "row_sparse" for rule in self.policy.rules):
            what = 'treatment "row_sparse", since each rank of a node would touch other rows'
        if what:
            raise UnsupportedError(
                f'shard_scope="matrix" is not possible with {what}; use shard_scope="shard".'
            )

    def treat(self, slot: ParamInfo, rank: int) -> Treatment:
        """Return the treatment of the block of a parameter that rank `rank` of the node
        holds.
        """
        if slot.whole is None:
            return self.policy.treat(slot.name, slot.shape)
        if self._intra_node.whole_matrices:
            whole = self.policy.treat(slot.name, slot.whole)
            if whole.low_rank or not whole.batched:
                # with either scope, quantization is of blocks
                return whole
        return self.policy.treat_block(
            slot.name, slot.block(self._intra_node, rank), slot.block(self._intra_node, 0)
        )

    def of_the_node(self, slot: ParamInfo) -> list[Treatment]:
        """Return the treatments of all blocks of a parameter in this node; that of the
        whole parameter alone, where the node computes it together.
        """
        ranks = (
            1 if slot.whole is None or self._intra_node.whole_matrices else self._intra_node.size
        )
        return [self.treat(slot, rank) for rank in range(ranks)]

    def compressor_for(self, treatment: Treatment) -> tuple[Compressor, ErrorFeedback]:
        """Return what carries a treatment out: the compressor with all that is around
        it, and how its errors are kept.
        """
        if treatment.low_rank:
            return self.low_rank_compressor, self.error_feedback
        scheme = treatment.scheme
        row_sparse = scheme == "row_sparse"
        compressor = RowSparse() if row_sparse else Quantized(codes=cast(FormatName, scheme))
        keeps = self.error_feedback.keeps_errors and compressor.feedback == "ef14"
        return compressor, self.error_feedback if keeps else ErrorFeedback(form=compressor.feedback)

    def initial_state(self, slot: ParamInfo, treatment: Treatment) -> dict[str, Tensor]:
        """Return symbol -> the state of a parameter before the first step."""
        context = Context((slot.name,), 0, self._seed, treatment.rank, m=treatment.m)
        like = torch.empty(0, dtype=slot.compute_dtype, device=slot.device)
        state = self.compressor_for(treatment)[0].initial_state(
            context, treatment.m, treatment.n, like
        )
        return {symbol: tensor[0] for symbol, tensor in state.items()}

    def describe(self) -> dict[str, Any]:
        """Return plain settings by name, which must be equal on all workers."""
        return {
            **self.low_rank_compressor.describe(),
            "min_compression_rate": float(self.policy.min_compression_rate),
            "rules": [asdict(rule) for rule in self.policy.rules],
            "error_feedback": asdict(self.error_feedback),
            "quantization": asdict(self.quantization),
        }


def _check_kind(name: str, given: object, kind: type, key: str, word: str) -> None:
    """Refuse what is neither None nor of the class, with an example of it; a word that
    was given in its place goes into the example.
    """
    if given is not None and not isinstance(given, kind):
        word = given if isinstance(given, str) else word
        raise ConfigError(
            f'{name} must be None or such as {kind.__name__}({key}="{word}"), got {given!r}.'
        )
