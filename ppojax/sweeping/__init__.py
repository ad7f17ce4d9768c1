"""Sweeps over mesh shapes, micro-batches and critics: cells, how they are run, and what is told of them.

`measure` runs a cell and loads jax; the other modules do not.
"""
