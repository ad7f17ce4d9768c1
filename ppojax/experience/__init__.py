"""Experience: rollouts packed into arrays, scored, summarised and dealt out as minibatches."""
