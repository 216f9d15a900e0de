"""The parts of the DeepSpeed adapter; `lowrank_comm.integrations.deepspeed` is its
public face.
"""
