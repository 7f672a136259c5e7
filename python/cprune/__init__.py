"""cprune: smaller Mixture-of-Experts checkpoints that route the same way."""
