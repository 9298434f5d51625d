"""Load a GGUF file with llama.cpp, generate one token, then a few more; print when and which as JSON.

Usage: llama_token.py FILE mmap|read. Times as in transformers_token.py.
"""

import json
import sys
import time

from llama_cpp import Llama

PROMPT = [1, 7, 77, 777]
MORE_TOKENS = 8


def main() -> None:
    imported = time.monotonic()
    model = Llama(sys.argv[1], n_ctx=256, n_threads=2, use_mmap=sys.argv[2] == "mmap", verbose=False)
    loaded = time.monotonic()
    model.create_completion(PROMPT, max_tokens=1, temperature=0)
    first_token = time.monotonic()
    tokens = []
    for token in model.generate(PROMPT, temp=0):
        tokens.append(int(token))
        if len(tokens) == MORE_TOKENS:
            break
    marks = {"imported": imported, "loaded": loaded, "first_token": first_token}
    print(json.dumps({**marks, "tokens": tokens, "device": "cpu"}))


main()
