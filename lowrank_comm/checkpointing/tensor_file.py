"""Writes a safetensors file one tensor at a time, with a checksum of all of it in its
header.

    8 bytes   length of the header
    header    JSON: "__metadata__", and for each tensor its dtype, shape and place
    tensors   byte after byte, those of wider dtypes first, so that each is aligned

safetensors itself writes what is in memory all at once, and no tensors that share
memory, as the errors of one shape do: it would need a copy of a whole error memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowrank_comm.checkpointing.durable import Checksum, bytes_of

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Key -> dtype and shape, by key in ascending order."""


def write_tensors(
    path: Path, layout: Layout, tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file.

    Args:
        path: of the file; what a dead run has left there is replaced.
        layout: of all tensors.
        tensors: in the order of the layout, as many; each is taken when the one before
            is written.
        metadata: text beside them; the entry "checksum" is added.
    """
    places, end = dict[str, tuple[int, int]](), 0
    for key, (dtype, shape) in sorted(layout.items(), key=lambda one: -one[1][0].itemsize):
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        places[key] = (start, end)
    found = Checksum(metadata)
    header = _header(layout, places, {**metadata, "checksum": found.text})
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(header)
        given = iter(tensors)
        for key in layout:
            held = next(given, None)
            if held is None or (held.dtype, held.shape) != layout[key]:
                raise ValueError(f"the tensors do not follow the layout at {key!r}")
            held = held.detach().cpu().contiguous()
            found.update(key, held)
            file.seek(len(header) + places[key][0])
            file.write(bytes_of(held))
            # not beside the next
            del held
        if next(given, None) is not None:
            raise ValueError("there are more tensors than the layout has")
        file.seek(0)
        # as long as before
        file.write(_header(layout, places, {**metadata, "checksum": found.text}))


def _header(
    layout: Layout, places: Mapping[str, tuple[int, int]], metadata: Mapping[str, str]
) -> bytes:
    entries = {
        key: {
            "dtype": _NAMES[layout[key][0]],
            "shape": list(layout[key][1]),
            "data_offsets": list(place),
        }
        for key, place in places.items()
    }
    text = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
