"""Write an adapter of another type as a LoRA, by PEFT's convert_to_lora on CPU."""

import sys

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModelForCausalLM

source, adapter, output, rank = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
save_as_lora(output, PeftModel.from_pretrained(model, adapter), rank=int(rank))
