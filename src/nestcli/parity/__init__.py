"""`nest compare`: whether this is NeMo's model, section by section, against a live NeMo or recorded facts of it."""
