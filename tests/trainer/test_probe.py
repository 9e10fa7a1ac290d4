import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    Qwen3NextConfig,
)

from strop.kernels import Group, PackedGroups
from strop.kernels.integrations.transformers import register
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.models.gguf import convert_gguf
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.console import Console
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.probe import probe

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_of(config, attention="strop"):
    register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("config", [
    LlamaConfig(**SMALL),
    GraniteConfig(**SMALL, logits_scaling=3.0, embedding_multiplier=2.0),
    CohereConfig(**SMALL, logit_scale=0.3),
    Gemma2Config(**SMALL, head_dim=8, sliding_window=4, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    PhiConfig(**SMALL),
], ids=lambda c: type(c).__name__)
def test_models_with_scaled_capped_and_biased_logits_run_packed(config):
    model = model_of(config)
    for parameter in model.get_output_embeddings().parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    assert probe(model, Console(enabled=False))
    assert model.config._attn_implementation == "strop"


def test_a_leak_between_siblings_falls_back_to_separate_rows():
    model, seen = model_of(LlamaConfig(**SMALL)), []

    def leak(module, args, output):
        return output + 0.1 * output.roll(7, dims=1) if output.shape[1] > 18 else output

    model.model.layers[0].mlp.register_forward_hook(leak)
    console = Console(enabled=False)
    console.warn = seen.append
    assert not probe(model, console) and "one completion per row" in seen[0]
    groups = PackedGroups.pack([Group([3, 4, 5], [[6, 7], [8]])])
    assert Scorer(model, packed=False)(groups).shape == (3,)


@pytest.mark.parametrize("config", [
    MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3),
    GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4),
    GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, attn_pdrop=0.0),
    Qwen3NextConfig(**SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                    shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
                    linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
], ids=lambda c: type(c).__name__)
def test_what_does_not_run_packed_is_never_run_packed(config):
    """Recurrent state, attention sinks, keywords dropped on the way: separate rows or a refusal."""
    model = model_of(config, "eager" if isinstance(config, MambaConfig) else "strop")
    groups = PackedGroups.pack([Group([3, 4, 5, 6], [[6, 7, 9], [8, 11]]), Group([7, 8], [[1, 5]])])
    try:
        packed = probe(model, Console(enabled=False))
    except UserError as e:
        assert "cannot be trained" in str(e) or "not a plain linear" in str(e)
        return
    logp = Scorer(model, packed)(groups)
    model.set_attn_implementation("eager")
    rows = [([3, 4, 5, 6], [6, 7, 9]), ([3, 4, 5, 6], [8, 11]), ([7, 8], [1, 5])]
    truth = []
    for prompt, completion in rows:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
        truth += [logits[len(prompt) - 1 + i, t] for i, t in enumerate(completion)]
    torch.testing.assert_close(logp, torch.stack(truth), rtol=0, atol=2e-4)


@pytest.mark.parametrize("config,why", [
    (Qwen3NextConfig(**SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                     shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
                     linear_key_head_dim=8, linear_value_head_dim=8,
                     layer_types=["linear_attention", "full_attention"]),
     "packed rows differ from separate rows"),
    (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "packed rows differ from separate rows"),
    (GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4), "s_aux"),
], ids=lambda c: type(c).__name__ if not isinstance(c, str) else "")
def test_hybrids_with_state_and_attention_sinks_are_refused_packed(config, why):
    """State that runs along the row, a convolution over it, a keyword that our attention does not know."""
    model, console, warned = model_of(config), Console(enabled=False), []
    console.warn = warned.append
    assert not probe(model, console)
    assert len(warned) == 1 and why in warned[0] and "does not run packed" in warned[0]
    assert model.config._attn_implementation != "strop", "it keeps the attention that transformers has for it"


def test_a_head_that_is_not_what_we_compute_is_refused():
    model = model_of(LlamaConfig(**SMALL))
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(UserError, match="LlamaForCausalLM: our head and its logits differ"):
        probe(model, Console(enabled=False))


def allocates_too_much(*_):
    torch.empty(1 << 60)  # RuntimeError: ... can't allocate memory


def out_of_device_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def other_error(*_):
    raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("fails, error, message", [
    (out_of_device_memory, torch.OutOfMemoryError, "Tried to allocate 2.00 GiB"),
    (allocates_too_much, RuntimeError, "can't allocate memory")], ids=["device", "host"])
def test_running_out_of_memory_does_not_mean_that_it_does_not_run_packed(fails, error, message):
    model, console, warned = model_of(LlamaConfig(**SMALL)).train(), Console(enabled=False), []
    console.warn = warned.append
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: fails() if args[0].shape[1] > 18 else None)  # the packed row, no separate one
    with pytest.raises(error, match=message) as raised:
        probe(model, console)
    assert not isinstance(raised.value, UserError) and warned == [] and model.training
    hook.remove()
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: other_error() if args[0].shape[1] > 18 else None)
    assert not probe(model, console) and "does not run packed (shapes do not match)" in warned[0]


@pytest.mark.parametrize("fails", [out_of_device_memory, allocates_too_much], ids=["device", "host"])
def test_running_out_of_memory_does_not_mean_that_weights_are_damaged(tiny_model, tmp_path, monkeypatch, fails):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUFxx")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: fails())
    for load in (lambda: ModelFolder(tiny_model).load(torch.float32, torch.device("cpu")),
                 lambda: convert_gguf(tmp_path / "m.gguf", Console(enabled=False))):
        with pytest.raises(RuntimeError, match="allocate") as raised:
            load()
        assert not isinstance(raised.value, UserError) and is_out_of_memory(raised.value)


@pytest.mark.parametrize("error, told", [
    (MemoryError(), True), (torch.OutOfMemoryError("x"), True), (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False), (UserError("out of memory"), False),
    (OSError("out of memory"), False)], ids=repr)
def test_what_out_of_memory_is(error, told):
    assert is_out_of_memory(error) == told
