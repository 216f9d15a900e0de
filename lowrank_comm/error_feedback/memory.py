"""Error memory: what a worker has been given and has not yet sent, in the gradient's
own units.

One tensor (B, m, n) holds the errors of a batch of same-shape matrices. A step reads it
once, and writes it once, when the step is committed: e <- Delta - sent, either into the
memory (`keep`), or into Delta's own place, which saves a pass: Delta then becomes the
memory, and the views that were handed out follow (`exchange`). A step that is vetoed or
rolled back never touches the memory, so it stays bit-equal without a copy.

On an accelerator the subtraction waits until the next step copies the errors into its
workspace (`copy_to`), where it costs no pass of its own; the memory holds Delta and the
factors of what was sent until then. Whoever looks at the memory before (a report, a
checkpoint, a view) has it subtracted first, and nobody sees the difference.

The memory's dtype may be narrower than the computation's (bfloat16, with stochastic
rounding, so that small residuals are not lost on average), and it may lie on the CPU
(`offload`): on a GPU in pinned memory, from and to which the host does not wait for
copies until somebody looks at it. float16 is refused: the memory is a sum, and 65 504
is soon reached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_comm.compressors.base import LowRank
from lowrank_comm.error_feedback.options import DTYPES, ErrorFeedback
from lowrank_comm.numerics.device import Transfers, numbers_on, on_accelerator, on_device
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.numerics.randomness import stream

# From so many elements on, a matrix is worth operations of its own: they take longer
# than Python needs for each.
LARGE = 1 << 15
# elements of a block of rows
BLOCK = 1 << 17
# elements that are rounded at random together
ROUNDED = 1 << 22


def row_blocks(matrix: Tensor) -> list[slice]:
    """Cut the rows of an (m, n) matrix into blocks that fit a CPU's cache; one block on
    other devices, where launches cost more, and of a matrix without numbers.
    """
    m, n = matrix.shape
    whole = matrix.is_meta or on_accelerator(matrix.device)
    rows = m if whole else max(1, BLOCK // n)
    return [slice(start, min(start + rows, m)) for start in range(0, m, rows)]


def places(rows: list[int], device: torch.device) -> slice | Tensor:
    """Return rows of a batch as an index: a slice, which makes views, where they follow
    each other; else a tensor that reached the device without a wait.
    """
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return numbers_on(device, rows, torch.int64)


class ErrorMemory:
    """Errors of one batch of matrices, (B, m, n), zero at the start (e_0 = 0 in
    Algorithm 2 of arXiv 2509.11254).

    Args:
        options: how it is kept; it stays zero where they keep no errors.
        names: parameter names, one for each matrix.
        m, n: shape of a matrix.
        dtype, device: of the computation.
        seed: for stochastic rounding; the draws differ between workers by `worker`.

    Attributes:
        on_host: whether it is kept there while Delta is on an accelerator.
    """

    def __init__(
        self,
        options: ErrorFeedback,
        names: tuple[str, ...],
        m: int,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        worker: int,
    ) -> None:
        self._options, self._names, self._seed, self._worker = options, names, seed, worker
        self.kept = options.keeps_errors
        # elsewhere than Delta
        self.on_host = options.offload and on_accelerator(device)
        # shapes alone take no room anywhere
        elsewhere = self.on_host and device.type != "meta"
        kept_on = torch.device("cpu") if elsewhere else device
        self._transfers = Transfers(device if self.on_host else None)
        # view -> its matrix's place in the batch
        self._views = WeakTensorKeyDictionary()
        stored = DTYPES[options.dtype] if options.dtype else dtype
        # what was sent, and is to be subtracted from the tensor
        self._owed: LowRank | None = None
        if self.kept:
            pin = self.on_host and device.type == "cuda"
            shape = (len(names), m, n)
            self._tensor = torch.zeros(shape, dtype=stored, device=kept_on, pin_memory=pin)
        else:
            # zeros that take no room and are never written
            self._tensor = torch.zeros((), dtype=dtype, device=device).expand(len(names), m, n)

    @property
    def tensor(self) -> Tensor:
        """The errors, (B, m, n), in the dtype and on the device where they are kept.

        To be read on the thread and the stream of the steps: a subtraction may take
        place.
        """
        self._transfers.wait()
        if self._owed is not None:
            owed, self._owed = self._owed, None
            with torch.no_grad(), full_precision(self._tensor.device):
                self._tensor.baddbmm_(owed.p, owed.q.mT, alpha=-1)
        return self._tensor

    def copy_to(self, work: Tensor, rows: list[int] | None) -> None:
        """Write the errors of all matrices, or of `rows`, into (B', m, n), in its dtype
        and on its device.
        """
        if rows is None and self._owed is not None:
            p, q = self._owed.p, self._owed.q
            torch.baddbmm(self._tensor, p, q.mT, alpha=-1, out=work)
            return
        errors = self._tensor if self.on_host else self.tensor
        if rows is not None:
            at = places(rows, errors.device)
            # an index makes a copy, on the host
            errors = errors[at] if isinstance(at, slice) else self.tensor[at]
        self._transfers.copy(work, errors)

    def view(self, row: int, shape: tuple[int, ...]) -> Tensor:
        """Return one matrix's error in the shape of its parameter, as a view that
        follows the memory.

        What is derived from the view (a slice, `.numpy()`) does not follow: `exchange`
        gives the memory another place.
        """
        view = self.tensor[row].view(shape)
        self._views[view] = row
        return view

    def exchange(self, delta: Tensor, sent: LowRank) -> Tensor | None:
        """Commit in Delta's place: Delta <- Delta - sent becomes the memory; on an
        accelerator without the subtraction, unless somebody holds a view.

        Args:
            delta: (B, m, n), overwritten.
            sent: this worker's contribution.

        Returns:
            The room that was the memory's, or None, and nothing done, if it differs
            from Delta's in dtype, or is elsewhere.
        """
        now = self._tensor
        if not self.kept or self.on_host or delta.dtype != now.dtype:
            return None
        free, self._tensor, self._owed = now, delta, None
        if on_accelerator(delta.device):
            self._owed = sent
            if self._views:
                delta = self.tensor
        elif delta[0].numel() < LARGE:
            delta.baddbmm_(sent.p, sent.q.mT, alpha=-1)
        else:
            for matrix, p, q in zip(delta, sent.p, sent.q, strict=True):
                matrix.addmm_(p, q.mT, alpha=-1)
        for view, row in self._views.items():
            now = delta[row].view(view.shape)
            view.set_(now.untyped_storage(), now.storage_offset(), now.shape, now.stride())
        return free

    def keep(
        self,
        delta: Tensor,
        sent: LowRank | Tensor | None,
        kept: Tensor | None,
        rows: list[int] | None,
        t: int,
    ) -> None:
        """Commit: e <- Delta - sent, or e <- kept where that is given.

        Args:
            delta: (B', m, n), gradient plus error of this step; overwritten.
            sent: this worker's contribution; None where `kept` is given.
            kept: the new error itself, or None.
            rows: which matrices of the batch these are, or None for all in order.
            t: step, for the draws of stochastic rounding.
        """
        if not self.kept:
            return
        if kept is None and isinstance(sent, LowRank) and rows is not None:
            at = places(rows, self._tensor.device)
            alike = delta.dtype == self._tensor.dtype and not self.on_host
            if alike and isinstance(at, slice):
                torch.baddbmm(delta, sent.p, sent.q.mT, alpha=-1, out=self.tensor[at])
                return
        if kept is None:
            assert sent is not None
            if isinstance(sent, LowRank):
                kept = delta.baddbmm_(sent.p, sent.q.mT, alpha=-1)
            else:
                kept = delta.sub_(sent)
        self.store(kept, rows, t)

    def store(
        self, error: Tensor, rows: list[int] | None = None, t: int = -1, shared: bool = False
    ) -> None:
        """Overwrite the memory of all matrices, or of `rows`, rounded to its dtype.

        Args:
            error: (B', m, n).
            rows: which matrices of the batch these are, or None for all in order.
            t: step, for the draws of stochastic rounding.
            shared: with the same draws on all workers, for errors that are equal on
                all.
        """
        if not self.kept:
            return
        if rows is None:
            self._owed = None
        at = slice(None) if rows is None else places(rows, self._tensor.device)
        if self._options.rounding == "stochastic" and error.dtype != self._tensor.dtype:
            self._round(error, range(len(error)) if rows is None else rows, t, shared)
        elif isinstance(at, slice):
            to = self._tensor if self.on_host else self.tensor
            self._transfers.copy(to[at], error)
        else:
            self.tensor[at] = error.to(self._tensor.device, self._tensor.dtype)
        if self._views:
            # whoever holds one may read it at any time
            self._transfers.wait()

    def _round(self, error: Tensor, rows: Sequence[int], t: int, shared: bool) -> None:
        """Store errors of these rows, rounded up or down at random to bfloat16.

        bfloat16 is the upper half of float32: adding uniform bits below the cut, then
        cutting, rounds up with the probability of what is cut off, so that the rounded
        value is right in expectation.
        """
        purpose = "rounding" if shared else f"rounding of worker {self._worker}"
        # the bits take as much room as the errors in float32
        together = max(1, ROUNDED // max(1, error[0].numel()))
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            noise = [
                torch.randint(
                    0,
                    1 << 16,
                    error.shape[1:],
                    dtype=torch.int32,
                    generator=stream(self._seed, self._names[row], t, purpose),
                    device="cpu",
                )
                for row in some
            ]
            bits = on_device(torch.stack(noise), error.device)
            del noise
            bits += error[start : start + together].float().view(torch.int32)
            bits &= -65536
            rounded = bits.view(torch.float32)
            at = places(list(some), self._tensor.device)
            if isinstance(at, slice):
                self._transfers.copy(self._tensor[at], rounded)
            else:
                self.tensor[at] = rounded.to(self._tensor.device, torch.bfloat16)
