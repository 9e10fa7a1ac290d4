"""What stands around a packed model in training: adapters, checkpointing, the probe; conversations of many turns."""

import pytest
import torch
import transformers
from chats import tokenizer_of, turns
from training import recipe_of
from transformers import AutoModelForCausalLM, LlamaConfig

from strop.kernels import Group, PackedGroups
from strop.kernels.integrations.transformers import register
from strop.trainer.data.chat import encode_completion, encode_conversation, encode_prompt
from strop.trainer.run.console import Console
from strop.trainer.training.batch import Example, collate
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.policy import add_lora
from strop.trainer.training.probe import by_logits, probe

CPU = torch.device("cpu")
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "Phi", "Phi3", "SmolLM3", "Olmo", "Olmo2"]
SMALL = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_of(family):
    head = {} if family in ("Phi", "Phi3", "Olmo", "Olmo2", "Mistral", "Qwen2", "Llama", "SmolLM3") else {"head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**SMALL, **head)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=register())


def groups_of(count, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 400, (n,), generator=draw).tolist()

    return PackedGroups.pack([Group(ids(11), [ids(1 + i % 6) for i in range(count)]), Group(ids(3), [ids(5), ids(2)])])


def separately(model, groups):
    """Log-probs by transformers' eager attention, a row a completion."""
    model.set_attn_implementation("eager")
    return by_logits(model, groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_probe(family):
    model = model_of(family)
    assert probe(model, Console(enabled=False)) and model.config._attn_implementation == "strop"


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_checkpointing_leave_packing_exact(family):
    pytest.importorskip("peft")
    model = model_of(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = add_lora(model, recipe_of(lora={"rank": 2}).lora, 0).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide a wrong adapter
                p.normal_(std=0.1)
    groups, trained = groups_of(3), {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, groups.num_targets)
    packed = Scorer(model)(groups)
    ours = torch.autograd.grad((packed * weights).sum(), list(trained.values()))
    model.get_base_model().set_attn_implementation("eager")
    truth = by_logits(model.get_base_model(), groups)
    theirs = torch.autograd.grad((truth * weights).sum(), list(trained.values()))
    torch.testing.assert_close(packed, truth, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()), msg=name)


@pytest.mark.parametrize("count", [2, 16, 64])
def test_scoring_many_samples_of_a_prompt(count):
    model, groups = model_of("Qwen3").eval(), groups_of(count)
    with torch.no_grad():
        torch.testing.assert_close(Scorer(model)(groups), separately(model, groups), rtol=1e-5, atol=1e-5)
    assert groups.num_tokens == 11 + sum(1 + i % 6 for i in range(count)) + 10, "the prompt stands there once"


@pytest.mark.parametrize("family", ["chatml", "generation", "llama3"])
def test_conversations_learn_the_assistants_turns_only(family):
    """Packed with another conversation: the very log-probs of the whole row, on what the assistant says and no more."""
    tokenizer = tokenizer_of(family)
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register()).eval()
    chats = [turns("what is 2+2?", "4", "is the sky blue", "the sky is blue"), turns("2+2", "4", "3+3", "6", "4", "2")]
    encoded = [encode_conversation(tokenizer, chat) for chat in chats]
    rows = [Example(str(i), Group(prompt, [e.tokens], [e.loss_mask])) for i, (prompt, e) in enumerate(encoded)]
    groups = collate(rows, [1, 0], CPU)
    logp = Scorer(model)(groups)
    model.set_attn_implementation("eager")
    for place, i in enumerate((1, 0)):
        prompt, e = encoded[i]
        ids = torch.tensor([[*prompt, *e.tokens]])
        whole = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        learned = torch.tensor([False] * (len(prompt) - 1) + e.loss_mask)
        first, last = groups.target_bounds[place]
        torch.testing.assert_close(logp[first:last], whole[learned], rtol=1e-5, atol=1e-5)
        end = tokenizer.decode(e.tokens[-1:])
        said = tokenizer.decode([t for t, on in zip(e.tokens, e.loss_mask, strict=True) if on])
        assert said == "".join(m["content"] + end for m in chats[i] if m["role"] == "assistant")


def test_a_pair_of_conversations_shares_what_comes_before_them():
    """Chosen and rejected go on for several turns from one history; each learns its own assistant turns."""
    tokenizer = tokenizer_of("chatml")
    history = turns("what is 2+2?", "4", "is the sky blue")
    sides = [turns("", "the sky is blue", "what is 2+2?", "4")[1:], turns("", "no")[1:]]
    encoded = [encode_completion(tokenizer, history, side) for side in sides]
    pair = Example("p", Group(encode_prompt(tokenizer, history), [e.tokens for e in encoded],
                              [e.loss_mask for e in encoded]))
    model = model_of("Llama").eval()
    groups = collate([pair], [0], CPU)
    torch.testing.assert_close(Scorer(model)(groups), separately(model, groups), rtol=1e-5, atol=1e-5)
    said = [tokenizer.decode(groups.target[a:b]) for a, b in groups.target_bounds]
    assert said == ["the sky is blue<|im_end|>4<|im_end|>", "no<|im_end|>"]
