"""Generative models: one file per family; beside them the few parts they share (data, ngram, sampling)."""
