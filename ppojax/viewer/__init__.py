"""What a person looks at: episodes of a run read back, coloured, on the terminal and as a page. Needs no jax."""
