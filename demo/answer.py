"""Ask a model directory some questions and print its greedy answers, as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("question", nargs="+")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    answers = {}
    for question in options.question:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False)
        new = out[0, prompt["input_ids"].shape[1] :]
        answers[question] = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    print(json.dumps(answers, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
