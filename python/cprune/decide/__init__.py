"""Pure functions from statistics to a plan."""
