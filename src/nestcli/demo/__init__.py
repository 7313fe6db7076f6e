"""The embedded corpus and the guided tour."""
