"""The compact model against the original."""
