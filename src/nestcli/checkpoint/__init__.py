"""Read and write checkpoints: .ckpt, .nemo, .safetensors, transformers folders, ONNX."""
