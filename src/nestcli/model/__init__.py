"""The NEST model. Waveforms go in, a loss comes out; start with nest.py, which shows every step in its `forward`.

The steps, in order: features.py (log-mel features), quantizer.py (target tokens of the clean audio), masking.py (blocks
of the noisy features), conformer.py (sub-sampling and the encoder, with attention.py), loss.py (the decoder and the
loss). config.py checks every block of the YAML, and optim.py has the optimiser and the learning rate. module.py trains
the model under Lightning. speech_encoder.py is the part to use after pretraining, nemo_encoder.py runs NeMo's encoder
in place of ours.

fast.py has the faster variants of the operations and chooses between them; torch_private.py has every private name of
PyTorch. count.py counts parameters, cost.py memory and arithmetic, health.py measures how training is doing.
"""
