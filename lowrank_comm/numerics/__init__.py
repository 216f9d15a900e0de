"""Arithmetic on tensors that knows nothing of training: linear algebra, random draws,
quantization, device transfers.
"""
