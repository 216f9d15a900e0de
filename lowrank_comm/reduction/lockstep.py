"""The lock-step protocol: many compressors, one conversation between the workers.

A pass goes on in phases, and all workers are in the same phase. In each phase

1. every live generator is advanced to its next request (`compressor_steps`). What needs
   no packet is answered at once: sums inside the node, and decisions, which the host
   reads. Generators are advanced until each has ended or asks for the wire;
2. the requests of all generators form one packet (`packet`), with what is averaged
   uncompressed in the first one. Its exchanges are yielded, to be carried out by the
   driver of this generator (`communication.driver`);
3. the pieces that come back are the generators' answers.

So a step has as many collectives as the algorithm has phases, however many matrices
there are; what is sent quantized takes one beside it, which more than two workers
follow by a second (`communication.quantized_mean`).

Before the host acts on what came back it reads whether a number was not finite on any
worker (`veto`). All workers read the same sums; if there is a veto, all close their
generators and return, and nothing has been changed.

A generator may wait until it is known which gradients exist (`passes.Presence`). It
takes no part in the first packet then. And generators that send whole matrices begin
one after the other, as there is room for them (`passes.Room`), in packets that follow.

Where the ranks of a node hold blocks of rows and compute whole matrices together
(`IntraNodeGroup.whole_matrices`), all ranks of all nodes are in lock-step. What
contracts over rows is summed inside the node before it goes on the wire; each rank then
carries its share of the sum to the other nodes, and the node puts the shares together
again. What the host reads is agreed inside the node.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

from torch import Tensor

from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.reduction.compressor_steps import CompressorSteps
from lowrank_comm.reduction.inverse_factors import inverse_factors
from lowrank_comm.reduction.packet import Packet
from lowrank_comm.reduction.passes import Agreed, Pass
from lowrank_comm.reduction.veto import Veto


def lockstep(one: Pass) -> Generator[list[Exchange], int, Agreed | None]:
    """Carry out one pass.

    Args:
        one: the pass: what is averaged and how; its `stats` are filled.

    Yields:
        What is to be exchanged in a phase, or in one of its legs; nothing, where all
        that is left waits for room. Is sent the number of collectives that it took.

    Returns:
        What the workers agreed on, or None if any worker's numbers were not finite.
    """
    steps = CompressorSteps(one)
    in_the_node, stats = one.wire.in_the_node, one.stats
    veto = Veto(in_the_node.group)
    dense: list[Tensor] = []
    phase = 0
    clock = time.perf_counter()
    # gives the room of its pieces back, whatever happens
    with contextlib.closing(steps):
        while True:
            while steps.advance():
                if steps.at_once:
                    answers = inverse_factors(steps.at_once)
                    if len(answers) < len(steps.at_once):
                        answers |= in_the_node.answer(steps.at_once)
                    steps.answer(answers)
                if steps.decisions:
                    decided = veto.read(steps.decisions)
                    if decided is None:
                        one.refused = veto.refused
                        return None
                    steps.answer(decided)
            if veto.suspects and veto.read({}) is None:
                one.refused = veto.refused
                return None
            if steps.waiting and veto.present is not None:
                steps.tell(veto.present)
                continue
            if phase > 0 and not steps.asking:
                if not steps.later:
                    break
                # a piece has ended just now, or another bucket's are on their way
                yield []
                continue
            packet = Packet(one, phase, steps.sent())
            for leg in packet.buffers.legs():
                stats.seconds["compress"] += time.perf_counter() - clock
                clock = time.perf_counter()
                stats.collectives += yield leg
                stats.seconds["communicate"] += time.perf_counter() - clock
                clock = time.perf_counter()
            steps.answer(packet.unpack())
            veto.suspect(packet)
            if phase == 0:
                # a view of it would hold the buffer, with a piece in it, to the end
                dense = [mean.clone() for mean in packet.dense] if one.pieces else packet.dense
                one.dense = ()
            phase += 1
            # what was given to it is not needed any more
            del packet
    stats.seconds["compress"] += time.perf_counter() - clock
    return Agreed(steps.results, dense, veto.present or [])
