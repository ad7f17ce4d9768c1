"""ppojax: reinforcement learning of language models in JAX."""
