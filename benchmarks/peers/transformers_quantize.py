"""Quantize a directory to NF4 with double quantization, by transformers and bitsandbytes on CPU."""

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

source, output = sys.argv[1:]
nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    source, quantization_config=nf4, dtype=torch.bfloat16, device_map="cpu"
)
model.save_pretrained(output)
