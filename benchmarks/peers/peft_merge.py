"""Merge a LoRA into a bfloat16 model and save it, by PEFT on CPU."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

source, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
