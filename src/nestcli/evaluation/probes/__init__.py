"""Probes: questions to the frozen features of an encoder, asked of baselines in the same way."""
