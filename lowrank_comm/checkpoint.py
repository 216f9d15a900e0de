"""Save the compressor's state beside a checkpoint, and load it: the public names of
`checkpointing`.
"""

from .checkpointing.file import FILE_NAME, load, save

__all__ = ["FILE_NAME", "load", "save"]
