"""How the compressor's state is saved: as one file beside a checkpoint (`file`), and
inside the optimizer's state dict (`state_dict`). `tag` says what a saved state is,
`whole_tensors` gathers its tensors, `tensors` puts them back. `folder` has everything
of a run.
"""
