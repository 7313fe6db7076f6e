"""The NEST model: features, masking, quantizer, FastConformer encoder, decoder, loss, and its Lightning module.

A batch passes through the files in this order; `nest.py` shows the whole way on one screen.
"""
