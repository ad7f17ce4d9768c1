"""Planning a run without its hardware: targets, compiled programs read for memory and collectives, arithmetic.

`targets` needs no jax; the other modules load it.
"""
