"""Rollouts: the sampler, its stop table, and the episodes that it plays."""
