"""A tiny chat model that has everything a real one has, and runs of it that take a second."""

import json
import string
from functools import partial

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, ChatML template, pad equal to eos."""
    vocab = {t: i for i, t in enumerate([*SPECIAL, *string.printable[:95], "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>",
                                   unk_token="<unk>", additional_special_tokens=["<|im_start|>"])
    fast.chat_template = CHATML
    return fast


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the threads of its process. If they stayed, those of all workers would spin beside each other."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random two-layer Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         tie_word_embeddings=True, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tiny_model, tmp_path):
    """A recipe file of two rounds on made-up prompts that a random model sometimes solves."""
    return write_recipe(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def tiny_run(tiny_model, tmp_path_factory):
    """The directory of a finished run of that recipe, one round; not to be changed."""
    from strop.trainer.main import main

    folder, threads = tmp_path_factory.mktemp("tiny"), torch.get_num_threads()
    assert main([str(write_recipe(folder, tiny_model)), "rounds=1", "sft.snapshots=1", "sft.ema_decay=0.5"]) == 0
    torch.set_num_threads(threads)
    return folder / "runs" / "tiny"


@pytest.fixture(scope="session")
def launcher():
    """A process that has all libraries loaded and forks runs of the program."""
    from killing import Launcher

    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def strop(launcher, tmp_path):
    """strop(*arguments, ranks=0, env=None): the program in a process of its own, with `ranks` as under torchrun. A
    subprocess.CompletedProcess."""
    return partial(launcher.run, tmp_path)


def write_recipe(folder, model):
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"say {a} or {b}", "answer": str(a)} for a in range(10) for b in range(10)]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = folder / "tiny.yaml"
    recipe.write_text(f"""\
name: tiny
output_dir: {folder / 'runs'}
dtype: float32
rounds: 2
threads: 1
model: {{path: {model}}}
data:
  validation: 10
  test: 10
  sources:
    - name: digits
      path: {prompts}
      verifier: regex
      verifier_args: {{pattern: "[0-9]"}}
sample: {{prompts: 24, k: 8, max_new_tokens: 24, shard_prompts: 6, batch_size: 32}}
sft: {{batch_size: 4, lr: 1.0e-3, checkpoint_steps: 1, start: previous}}
dpo: {{batch_size: 4, lr: 1.0e-4, checkpoint_steps: 1}}
evaluate: {{max_new_tokens: 8, bootstrap: 100}}
log: {{tensorboard: false}}
""")
    return recipe
