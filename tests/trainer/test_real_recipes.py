"""The recipes at real size: each runs from end to end with a tiny random model of its architecture."""

import json

import pytest
import torch
import yaml
from conftest import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from strop.trainer.cli import SHIPPED, load_recipe
from strop.trainer.methods.running import train
from strop.trainer.planning.models import CONFIGS

REAL = ["llama-8b", "llama-70b", "qwen-7b-lora", "qwen-1.5b"]
# numbers that take seconds, and what needs the real hardware
SMALL = {"rounds": 1, "dtype": "float32", "threads": 1, "device": "cpu", "data.validation": 8, "data.test": 8,
         "sample.prompts": 16, "sample.k": 4, "sample.max_new_tokens": 24, "sample.shard_prompts": 8,
         "sft.batch_size": 8, "dpo.batch_size": 8, "evaluate.max_new_tokens": 8, "evaluate.bootstrap": 100,
         "log.tensorboard": False, "data.sources.0.verifier": "regex",
         "data.sources.0.verifier_args": {"pattern": "[0-9]"}}


def tiny(name: str, folder):
    """A random model with the config of the recipe's, in small sizes."""
    config = next(c for known, c in CONFIGS.items() if name.startswith(known))
    tokenizer = character_tokenizer()
    small = AutoConfig.for_model(config["model_type"], vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=config["tie_word_embeddings"], initializer_range=0.2,
                                 max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
                                 pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_in(folder):
    """Rows as GSM8K has them."""
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
            for a in range(12) for b in range(12)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "gsm8k.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_recipe_runs_from_end_to_end(name, tmp_path):
    recipe = load_recipe(name)
    if recipe.lora.rank:
        pytest.importorskip("peft")
    keys = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    for section in (keys["sample"], keys["evaluate"]):  # vLLM needs GPUs
        for key in ("engine", "tensor_parallel_size"):
            section.pop(key, None)
    keys.pop("engine", None)
    done = train(keys, SMALL | {"output_dir": str(tmp_path / "runs"), "data.sources.0.path": str(rows_in(tmp_path)),
                                "model.path": str(tiny(recipe.model.path, tmp_path / "model"))})
    stages = done.plan["stages"]
    assert {s["state"] for s in stages} == {"done"}
    assert {"round-00/sft", "round-00/dpo", "final"} <= {s["stage"] for s in stages}
