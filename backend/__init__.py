"""Computation: ranks and sharding, the model, micro-batches, sampling, memory."""
