"""`nest compare`: check section by section that this is NeMo's model, against a live NeMo or recorded facts."""
