"""head_of: our head on a model's hidden states gives the log-probs of the model's own logits."""

import pytest
import torch
from torch import nn

from strop.kernels import linear_logprob
from strop.kernels.integrations.transformers import head_of

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_expand": 1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
MAMBA |= {"mamba_d_state": 8}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Model types with the scale and softcap that head_of must find.
KINDS = {
    "llama": ({}, 1.0, None),
    "cohere": ({"logit_scale": 0.25}, 0.25, None),
    "cohere2": ({"logit_scale": 0.25}, 0.25, None),
    "granite": ({"logits_scaling": 4.0}, 0.25, None),
    "granitemoe": ({"logits_scaling": 4.0, **MOE}, 0.25, None),
    "granitemoeshared": ({"logits_scaling": 4.0, "shared_intermediate_size": 16, **MOE}, 0.25, None),
    "granitemoehybrid": ({"logits_scaling": 4.0, "layer_types": ["attention"] * 2, **MAMBA, **MOE}, 0.25, None),
    "falcon_h1": ({"lm_head_multiplier": 0.3, **MAMBA}, 0.3, None),
    "hyperclovax": ({"logits_scaling": 3.0}, 3.0, None),
    "minicpm3": ({"dim_model_base": 8, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                  "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}, 0.25, None),
    "gemma2": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "gemma3_text": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "gemma4_text": ({"final_logit_softcapping": 2.0, "vocab_size_per_layer_input": 61}, 1.0, 2.0),
    "vaultgemma": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "nanochat": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "recurrent_gemma": ({"logits_soft_cap": 2.0, "lru_width": 32, "attention_window_size": 8}, 1.0, 2.0),
    "mpt": ({"logit_scale": 0.5, "d_model": 32, "n_heads": 4, "n_layers": 2}, 1.0, None),
    "cohere2_moe": ({"logit_scale": 0.25, "num_experts": 2, "num_experts_per_tok": 1}, 0.25, None),
    "granite_swa": ({"logits_scaling": 4.0}, 0.25, None),
    "granitemoe_swa": ({"logits_scaling": 4.0, **MOE}, 0.25, None),
    "inkling_text": ({"logits_mup_width_multiplier": 4.0, **MOE}, 0.25, None),
    "inkling2_text": ({"final_logit_softcapping": 2.0, **MOE}, 1.0, 2.0),
    "beam": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "xlstm": ({"output_logit_soft_cap": 2.0, "num_heads": 4}, 1.0, 2.0),
    "phi": ({}, 1.0, None),  # a head with a bias
}  # fmt: skip


def _model(kind: str) -> nn.Module:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | KINDS[kind][0]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.normal_()  # logits large enough for a cap to bend
        if head.bias is not None:
            head.bias.normal_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_probs_are_those_of_the_models_own_logits(kind: str):
    model = _model(kind)
    head = head_of(model)
    assert (head.scale, head.softcap) == (pytest.approx(KINDS[kind][1]), KINDS[kind][2])
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    hidden = model.base_model(ids, use_cache=False)[0][0, :-1]
    truth = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    scaling = {"logit_scale": head.scale, "softcap": head.softcap}
    found = linear_logprob(hidden, head.weight, ids[0, 1:], head.bias, **scaling)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    plain = linear_logprob(hidden, head.weight, ids[0, 1:], head.bias)
    if KINDS[kind][1:] != (1.0, None):
        assert (plain - truth).abs().mean() > 0.1, "the scale or cap is too weak for this test to see"


def test_a_head_that_is_not_a_plain_linear_layer_raises():
    model = _model("llama")

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (Doubled(32, 61), nn.Identity()):
        model.lm_head = layer
        with pytest.raises(ValueError, match=f"its head is a {type(layer).__name__}, not a plain linear layer"):
            head_of(model)
