"""FSDP2 with two levels (HSDP): sharded inside a node, compressed between nodes.

FSDP's own reduce-scatter leaves the exact mean of the node on each rank, as a block of
rows; the reducer averages these blocks between the nodes. State dicts hold DTensors,
which torch.distributed.checkpoint can reshard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lowrank_comm.checkpointing.whole_tensors import block_bases, of_blocks
from lowrank_comm.communication import Group, IntraNodeGroup
from lowrank_comm.errors import UnsupportedError
from lowrank_comm.integrations._fsdp import internals
from lowrank_comm.integrations._fsdp.base import FSDPEngine, local, padded, shard_dim
from lowrank_comm.reduction.params import ParamInfo, gradient_dtype
from lowrank_comm.reduction.plan import human_bytes
from lowrank_comm.reduction.policy import Treatment
from lowrank_comm.reduction.reducer import Reducer


class HSDPEngine(FSDPEngine):
    """Sharded inside the node, replicated between nodes.

    Args:
        model: after fully_shard.
        group: between nodes.
        intra_node: inside a node.
        give_back: functions that switch FSDP's own all-reduce between nodes on again,
            where it was switched off.
    """

    name = "FSDP2, HSDP"
    accumulates_by = (
        "model.set_requires_all_reduce(False)` before, or `with optimizer.no_sync():"
        " loss.backward()"
    )

    saves_whole = False

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        intra_node: IntraNodeGroup,
        give_back: list[Callable[[], None]],
    ) -> None:
        super().__init__(model, group, intra_node)
        self._give_back = give_back
        self._mesh: DeviceMesh | None = None
        self._named: dict[str, Tensor] = {}

    @override
    def slots(self, named: Sequence[tuple[str, Tensor]]) -> list[ParamInfo]:
        self._named = dict(named)
        slots = []
        for name, p in named:
            held, dim = local(p), shard_dim(p)
            if dim != 0 and self.intra_node.whole_matrices:
                raise UnsupportedError(
                    f'attach: {name} is sharded along dimension {dim}, and shard_scope="matrix"'
                    ' needs blocks of rows; use Shard(0), or shard_scope="shard".'
                )
            whole = tuple(p.shape) if self.intra_node.size > 1 else None
            dtype = gradient_dtype(p)
            slots.append(ParamInfo(name, tuple(held.shape), dtype, held.device, whole, dim))
        return slots

    @override
    def is_last_backward(self) -> bool:
        return super().is_last_backward() and internals.wants_all_reduce(self._groups)

    @override
    def saved(
        self, reducer: Reducer, whole: dict[str, dict[str, Tensor]] | None
    ) -> dict[str, dict[str, Tensor]]:
        """Return DTensors, which torch.distributed.checkpoint can reshard: errors, and
        all else that has a parameter's shape, are placed like their parameters; bases
        of blocks stay blocks.
        """
        result: dict[str, dict[str, Tensor]] = {}
        for slot, largest, shaped in reducer.state.blocks():
            parameter = self._named[slot.name]
            views = {}
            for symbol, tensor in shaped.items():
                kept = tensor if symbol == "error" else tensor.clone()
                views[symbol] = self.error_view(slot, parameter, kept)
            result[slot.name] = views | self._bases(reducer, slot, largest, parameter)
        return result

    def _bases(
        self, reducer: Reducer, slot: ParamInfo, largest: Treatment, parameter: Tensor
    ) -> dict[str, Tensor]:
        """Return the bases of a parameter, as DTensors where each rank has its own."""
        bases, size = block_bases(reducer, slot, largest), self.intra_node.size
        if size == 1 or self.intra_node.whole_matrices:
            return bases
        mesh = self._shard_mesh(parameter)
        replicated = reducer.assignment.compressor_for(largest)[0].replicated_state
        plain = {symbol: bases.pop(symbol) for symbol in replicated if symbol in bases}
        blocks: dict[str, Tensor] = {
            of_blocks(symbol, size): DTensor.from_local(basis, mesh, (Shard(0),), run_check=False)
            for symbol, basis in bases.items()
        }
        # Checkpoints take what is plain from any rank, so a rank without rows, which
        # has seen nothing, has none.
        return blocks | (plain if slot.numel else {})

    def _shard_mesh(self, parameter: Tensor) -> DeviceMesh:
        assert isinstance(parameter, DTensor)
        if self._mesh is None:
            inside, mesh = self.intra_node.process_group, parameter.device_mesh
            self._mesh = mesh if inside is None else DeviceMesh.from_group(inside, mesh.device_type)
        return self._mesh

    @override
    def error_view(self, slot: ParamInfo, parameter: Tensor, error: Tensor) -> Tensor:
        mesh = self._shard_mesh(parameter)
        # one rank in a node: the parameter's own mesh is all there is
        if mesh.ndim != 1:
            return error
        size, stride = parameter.shape, parameter.stride()
        view = DTensor.from_local(
            error, mesh, (Shard(slot.dim),), run_check=False, shape=size, stride=stride
        )
        # This very tensor, and not a view of it: when the error memory moves, it takes
        # along the views that it has given.
        view._local_tensor = error
        return view

    @override
    def notes(self) -> list[str]:
        trained = [p for p in self._model.parameters() if p.requires_grad]
        held = human_bytes(sum(padded(p, self.intra_node.size) for p in trained))
        how = "fully_shard works inside the node only"
        if self._groups[0].mesh_info.mesh.ndim == 2:
            how = "fully_shard's all-reduce between nodes is off"
        carried = f"its exact reduce-scatter in a node carries {held} a backward pass"
        return [f"FSDP2, HSDP: {how}; {carried}", "error memory is that of this rank's shards"]
