"""Save and load everything of a run (`save_all`, `load_all`), or the compressor's state
alone, beside a checkpoint of one's own (`save`, `load`). The public names of
`checkpointing`.
"""

from .checkpointing.file import FILE_NAME, load, save
from .checkpointing.folder import load_all, save_all

__all__ = ["FILE_NAME", "load", "load_all", "save", "save_all"]
