"""`nest prepare-data`: find audio, check it, select and cut utterances, write manifests and shards."""
