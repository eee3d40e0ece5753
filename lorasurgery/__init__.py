"""Surgery on LoRA-family adapters and quantized checkpoints: file to file, streaming, with proof."""

__version__ = "0.1.0"
