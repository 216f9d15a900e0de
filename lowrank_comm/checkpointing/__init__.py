"""How the compressor's state is saved: as one file beside a checkpoint (`file`), and
inside the optimizer's state dict (`state_dict`). `tag` says what a saved state is,
`tensors` gathers and restores its tensors.
"""
