"""Self-supervised speech pretraining with NEST, exact to NVIDIA NeMo 3.0.0 and without NeMo."""

__version__ = "0.1.0"
