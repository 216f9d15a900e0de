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
(`offload`). float16 is refused: the memory is a sum, and 65 504 is soon reached.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_comm.compressors.base import LowRank
from lowrank_comm.error_feedback.options import DTYPES, ErrorFeedback
from lowrank_comm.numerics.device import numbers_on, on_accelerator
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.numerics.randomness import stream

# From so many elements on, a matrix is worth operations of its own: they take longer
# than Python needs for each.
LARGE = 1 << 15
# elements of a block of rows
BLOCK = 1 << 17


def row_blocks(matrix: Tensor) -> list[slice]:
    """Cut the rows of an (m, n) matrix into blocks that fit a CPU's cache; one block on
    other devices, where launches cost more.
    """
    m, n = matrix.shape
    rows = m if on_accelerator(matrix.device) else max(1, BLOCK // n)
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
        kept_on = torch.device("cpu") if options.offload else device
        # view -> its matrix's place in the batch
        self._views = WeakTensorKeyDictionary()
        stored = DTYPES[options.dtype] if options.dtype else dtype
        # what was sent, and is to be subtracted from the tensor
        self._owed: LowRank | None = None
        if self.kept:
            self._tensor = torch.zeros(len(names), m, n, dtype=stored, device=kept_on)
        else:
            # zeros that take no room and are never written
            self._tensor = torch.zeros((), dtype=dtype, device=device).expand(len(names), m, n)

    @property
    def tensor(self) -> Tensor:
        """The errors, (B, m, n), in the dtype and on the device where they are kept."""
        if self._owed is not None:
            owed, self._owed = self._owed, None
            with torch.no_grad(), full_precision(self._tensor.device):
                self._tensor.baddbmm_(owed.p, owed.q.mT, alpha=-1)
        return self._tensor

    def on(self, device: torch.device) -> Tensor:
        """Return the errors on the device of the computation: the memory itself, or a
        copy where it is offloaded.
        """
        if self.tensor.device == device:
            return self.tensor
        return self.tensor.to(device, non_blocking=True)

    def copy_to(self, work: Tensor, rows: list[int] | None) -> None:
        """Write the errors of all matrices, or of `rows`, into (B', m, n), in its dtype
        and on its device.
        """
        if rows is None and self._owed is not None:
            p, q = self._owed.p, self._owed.q
            torch.baddbmm(self._tensor, p, q.mT, alpha=-1, out=work)
            return
        errors = self.tensor
        if rows is not None:
            errors = errors[places(rows, errors.device)]
        work.copy_(errors, non_blocking=True)

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
            from Delta's in dtype or device.
        """
        now = self._tensor
        if not self.kept or delta.dtype != now.dtype or delta.device != now.device:
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
        sent: LowRank | Tensor,
        kept: Tensor | None,
        rows: list[int] | None,
        t: int,
    ) -> None:
        """Commit: e <- Delta - sent, or e <- kept where that is given.

        Args:
            delta: (B', m, n), gradient plus error of this step; overwritten.
            sent: this worker's contribution.
            kept: the new error itself, or None.
            rows: which matrices of the batch these are, or None for all in order.
            t: step, for the draws of stochastic rounding.
        """
        if not self.kept:
            return
        if kept is None and isinstance(sent, LowRank) and rows is not None:
            at = places(rows, self._tensor.device)
            alike = delta.dtype == self._tensor.dtype and delta.device == self._tensor.device
            if alike and isinstance(at, slice):
                torch.baddbmm(delta, sent.p, sent.q.mT, alpha=-1, out=self.tensor[at])
                return
        if kept is None:
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
        rounded = self._rounded(error, rows, t, shared)
        if rows is None:
            self._owed = None
            self._tensor.copy_(rounded)
        else:
            self.tensor[places(rows, self._tensor.device)] = rounded.to(self._tensor.device)

    def _rounded(self, error: Tensor, rows: list[int] | None, t: int, shared: bool) -> Tensor:
        if self._options.rounding == "nearest" or error.dtype == self.tensor.dtype:
            return error.to(self.tensor.dtype)
        # bfloat16 is the upper half of float32: adding uniform bits below the cut, then
        # cutting, rounds up with the probability of what is cut off, so that the
        # rounded value is right in expectation.
        purpose = "rounding" if shared else f"rounding of worker {self._worker}"
        names = self._names if rows is None else tuple(self._names[row] for row in rows)
        noise = [
            torch.randint(
                0,
                1 << 16,
                error.shape[1:],
                dtype=torch.int32,
                generator=stream(self._seed, name, t, purpose),
                device="cpu",
            )
            for name in names
        ]
        bits = error.float().contiguous().view(torch.int32) + torch.stack(noise).to(error.device)
        return (bits & -65536).view(torch.float32).to(torch.bfloat16)
