"""Experiments and demonstrations, all of them reached by `loftq lab`."""
