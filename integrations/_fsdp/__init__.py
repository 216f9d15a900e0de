"""The parts of the FSDP2 and HSDP adapter; `lowrank_comm.integrations.fsdp` is its
public face.
"""
