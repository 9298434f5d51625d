"""Write a small GGUF of the Llama architecture with seeded random weights. Usage: make_gguf.py FILE [small|large].

small is 0.14 GB, for tests; large is 1.4 GB, for benchmarks.
"""

import sys

import gguf
import numpy as np

SIZES = {"small": (768, 2048, 8, 12, 4, 8000), "large": (2048, 5632, 12, 32, 8, 32000)}
WIDTH, INNER, BLOCKS, HEADS, KV_HEADS, VOCABULARY = SIZES[sys.argv[2] if len(sys.argv) > 2 else "small"]
BYTE_TOKENS = 256


def tokens() -> tuple[list[bytes], list[int]]:
    """Return a SentencePiece-like vocabulary: three specials, all bytes, then words."""
    kind = gguf.TokenType
    specials = [(b"<unk>", kind.UNKNOWN), (b"<s>", kind.CONTROL), (b"</s>", kind.CONTROL)]
    single = [(f"<0x{value:02X}>".encode(), kind.BYTE) for value in range(BYTE_TOKENS)]
    words = [(f"\u2581w{n}".encode(), kind.NORMAL) for n in range(VOCABULARY - len(specials) - len(single))]
    texts, kinds = zip(*specials, *single, *words, strict=True)
    return list(texts), [int(item) for item in kinds]


def main() -> None:
    writer = gguf.GGUFWriter(sys.argv[1], "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    texts, kinds = tokens()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([-float(rank) for rank in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(4)

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))

    kv = WIDTH // HEADS * KV_HEADS
    weight("token_embd.weight", VOCABULARY, WIDTH)
    for block in range(BLOCKS):
        norm(f"blk.{block}.attn_norm.weight")
        norm(f"blk.{block}.ffn_norm.weight")
        for name, rows in (("attn_q", WIDTH), ("attn_k", kv), ("attn_v", kv), ("attn_output", WIDTH)):
            weight(f"blk.{block}.{name}.weight", rows, WIDTH)
        for name, shape in (("ffn_gate", (INNER, WIDTH)), ("ffn_up", (INNER, WIDTH)), ("ffn_down", (WIDTH, INNER))):
            weight(f"blk.{block}.{name}.weight", *shape)
    norm("output_norm.weight")
    weight("output.weight", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
