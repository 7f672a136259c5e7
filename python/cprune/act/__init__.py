"""Carry out a plan, shard to shard."""
