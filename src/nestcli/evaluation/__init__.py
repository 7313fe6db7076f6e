"""What a trained encoder is good for: features of a corpus, and how much they know."""
