"""Use a trained encoder: extract features of a corpus, and measure with probes how much they know."""
