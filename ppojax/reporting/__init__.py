"""Several runs on one page: what they have in common, how they differ, and how sure that is. Needs no jax."""
