"""`nest augment`: write noisy copies of a corpus to disk."""
