"""How the compressor's state is saved: as one file beside a checkpoint, and inside the
optimizer's state dict.
"""
