"""Load a model with transformers and print the token ids of a greedy completion as JSON."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
inputs = tokenizer("w7 w77 w777", return_tensors="pt")
output = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False)
print(json.dumps(output[0].tolist()))
