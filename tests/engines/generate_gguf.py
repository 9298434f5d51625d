"""Load a GGUF with llama.cpp and print the greedy completion as JSON. Usage: generate_gguf.py FILE mmap|read."""

import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=256, n_threads=2, use_mmap=sys.argv[2] == "mmap", verbose=False)
answer = model.create_completion("w7 w77 w777", max_tokens=12, temperature=0)
print(json.dumps(answer["choices"][0]["text"]))
