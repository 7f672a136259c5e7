"""Measure: text through the model, and what it says about the experts. Reads the model, never changes it."""
