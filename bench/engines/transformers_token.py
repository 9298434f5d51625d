"""Load a model with transformers, generate one token, then a few more; print when and which as JSON.

Usage: transformers_token.py DIRECTORY view|copy|dummy

view: as from_pretrained leaves it (on the CPU the tensors stay views of the mapped files).
copy: every weight is copied out, as a load onto a GPU does; onto the GPU itself where there is one.
dummy: no weight is read; what the engine costs by itself.
Times are CLOCK_MONOTONIC seconds, comparable with those of the process that started this one.
"""

import json
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPT = [1, 7, 77, 777]
MORE_TOKENS = 8


def load(path: str, mode: str) -> torch.nn.Module:
    if mode == "dummy":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.zero_()
        return model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    if mode == "copy":
        if torch.cuda.is_available():
            return model.to("cuda")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def main() -> None:
    path, mode = sys.argv[1], sys.argv[2]
    imported = time.monotonic()
    AutoTokenizer.from_pretrained(path)
    model = load(path, mode)
    loaded = time.monotonic()
    prompt = torch.tensor([PROMPT], device=next(model.parameters()).device)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=1, **options)
    first_token = time.monotonic()
    tokens = model.generate(prompt, max_new_tokens=MORE_TOKENS, **options)[0].tolist()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    marks = {"imported": imported, "loaded": loaded, "first_token": first_token}
    print(json.dumps({**marks, "tokens": tokens, "device": device}))


main()
