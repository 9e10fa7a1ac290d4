"""config.json of public models, as far as their sizes go: a plan needs no download."""

from strop.trainer.planning.shape import Shape, shape_of


def _config(kind: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int,
            tied: bool = False, **more) -> dict:
    return {"model_type": kind, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "max_position_embeddings": context, "tie_word_embeddings": tied} | more


CONFIGS = {
    "HuggingFaceTB/SmolLM2-135M": _config("llama", 576, 1536, 30, 9, 3, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": _config("llama", 2048, 8192, 24, 32, 32, 49152, 8192, True),
    "Qwen/Qwen2.5-0.5B": _config("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, True),
    "Qwen/Qwen2.5-1.5B": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, True),
    "Qwen/Qwen2.5-3B": _config("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, True),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "Qwen/Qwen2.5-14B": _config("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768),
    "Qwen/Qwen2.5-32B": _config("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768),
    "Qwen/Qwen2.5-72B": _config("qwen2", 8192, 29568, 80, 64, 8, 152064, 32768),
    "meta-llama/Llama-3.2-1B": _config("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, head_dim=64),
    "meta-llama/Llama-3.2-3B": _config("llama", 3072, 8192, 28, 24, 8, 128256, 131072, True, head_dim=128),
    "meta-llama/Llama-3.1-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.1-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "meta-llama/Llama-3.3-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
}


def known_shape(name: str) -> Shape | None:
    """The shape of owner/name[@revision], with or without -Instruct; None if it is not listed."""
    name = name.split("@")[0]
    config = CONFIGS.get(name) or CONFIGS.get(name.removesuffix("-Instruct"))
    return shape_of(config, name) if config else None
