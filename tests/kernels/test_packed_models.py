"""Packed rows against one completion per row, on tiny random models with transformers' eager attention."""

import importlib
from functools import partial
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from strop.kernels import Group, PackedGroups, linear_logprob, preference_loss
from strop.kernels.integrations.transformers import attention_forward, register

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi": transformers.PhiConfig,
    "phi3": transformers.Phi3Config,
    "smollm3": transformers.SmolLM3Config,
    "olmo": transformers.OlmoConfig,
    "olmo2": transformers.Olmo2Config,
    "olmo3": transformers.Olmo3Config,
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _model(name: str):
    config = CONFIGS[name](
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    # Narrower than the rows, so that windows cut and must count positions.
    config.sliding_window = 5
    if "gemma" in name or name == "olmo3":
        config.layer_types = ["sliding_attention", "full_attention"]
    if name == "smollm3":  # a layer with and one without rotary positions
        config.no_rope_layers = [1, 0]
    if name == "gemma2":  # low enough that the caps bend the scores
        config.attn_logit_softcapping, config.final_logit_softcapping = 2.0, 3.0
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms are no longer all zeros and ones
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _groups(loss_masks: bool = True) -> list[Group]:
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 61, (n,), generator=generator).tolist()

    masks = [[True] * 6 + [False], [False, *[True] * 3]] if loss_masks else None
    return [
        Group(tokens(6), [tokens(4), tokens(9)]),
        Group([], [tokens(5), tokens(3)]),
        Group(tokens(9), [tokens(7), tokens(4)], masks),
        Group(tokens(1), [tokens(1), tokens(2)]),
    ]


def _logp(model, hidden: torch.Tensor, groups: PackedGroups) -> torch.Tensor:
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return linear_logprob(hidden, head.weight, groups.target, head.bias, softcap=cap)


class SeparateRows(NamedTuple):
    """The completions of packed groups one per row, right-padded, each after a copy of its prompt.

    input_ids, attention_mask, position_ids: [completions, longest row] int64. pred_index [targets] int64 indexes the
    flattened rows and predicts the groups' `target`, in the same order.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    pred_index: torch.Tensor


def separate_rows(groups: PackedGroups, pad_id: int = 0) -> SeparateRows:
    prompts = [groups.prompt_bounds[g] for g in groups.completion_group]
    rows = [
        groups.input_ids[[*range(*prompt), *range(*completion)]]
        for prompt, completion in zip(prompts, groups.completion_bounds, strict=True)
    ]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    width = input_ids.shape[1]
    columns = torch.arange(width).repeat(len(rows), 1)
    attention_mask = (columns < torch.tensor([len(row) for row in rows])[:, None]).long()
    # A token's position in the packed row is its offset in a row of its own.
    pred_index = groups.target_segment.long() * width + groups.position_ids[groups.pred_index]
    return SeparateRows(input_ids, attention_mask, columns, pred_index)


def test_separate_rows_predict_the_same_targets_from_the_same_tokens():
    g = PackedGroups.pack(
        [
            Group([1, 2, 3], [[4, 5], [6], [7, 8, 9]]),
            Group([], [[1, 2], [3, 4, 5]]),
            Group([9, 9], [[2, 3, 4]], [[True, False, True]]),
        ]
    )
    rows = separate_rows(g, pad_id=77)
    assert rows.input_ids.tolist()[2] == [1, 2, 3, 7, 8, 9]
    assert rows.input_ids.tolist()[3] == [1, 2, 77, 77, 77, 77]
    assert rows.attention_mask.sum(1).tolist() == [5, 4, 6, 2, 3, 5]
    assert torch.equal(rows.input_ids.flatten()[rows.pred_index], g.input_ids[g.pred_index])
    assert torch.equal(rows.input_ids.flatten()[rows.pred_index + 1], g.target)
    assert torch.equal(rows.position_ids.flatten()[rows.pred_index], g.position_ids[g.pred_index])


def packed_logp(model, groups: PackedGroups) -> torch.Tensor:
    model.set_attn_implementation(register())
    ids, positions = groups.input_ids[None], groups.position_ids[None]
    out = model.model(input_ids=ids, position_ids=positions, groups=groups, use_cache=False)
    return _logp(model, out.last_hidden_state[0][groups.pred_index], groups)


def separate_logp(model, groups: PackedGroups) -> torch.Tensor:
    """transformers' logits, [completions, longest, vocab], without any of our code but the row layout."""
    model.set_attn_implementation("eager")
    rows = separate_rows(groups)
    out = model(rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.position_ids, use_cache=False)
    logits = out.logits.flatten(0, 1)[rows.pred_index]
    return logits.log_softmax(-1).gather(1, groups.target[:, None]).squeeze(1)


def _loss_and_gradients(model, logp: torch.Tensor, groups: PackedGroups):
    reference = torch.linspace(-4, -2, groups.num_targets)
    loss, _ = preference_loss(
        logp, reference, segments=groups.target_segment, num_segments=groups.num_completions, nll_weight=0.2
    )
    parameters = dict(model.named_parameters())
    return loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate_rows(name: str):
    model, groups = _model(name), PackedGroups.pack(_groups())
    packed, separate = packed_logp(model, groups), separate_logp(model, groups)
    torch.testing.assert_close(packed, separate, **TOLERANCE)
    loss, gradients = _loss_and_gradients(model, packed, groups)
    expected_loss, expected = _loss_and_gradients(model, separate, groups)
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE)
    for parameter, gradient in gradients.items():
        scale = max(1.0, expected[parameter].abs().max().item())
        torch.testing.assert_close(gradient / scale, expected[parameter] / scale, **TOLERANCE, msg=parameter)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_mask_raises(name: str):
    model, groups = _model(name), PackedGroups.pack(_groups())
    model.set_attn_implementation(register(model))
    mask = torch.ones(1, groups.num_tokens, dtype=torch.int64)
    mask[0, -2:] = 0
    call = {"position_ids": groups.position_ids[None], "groups": groups, "use_cache": False}
    for module in (model, model.model):
        with pytest.raises(ValueError, match="attention_mask must be None"):
            module(groups.input_ids[None], attention_mask=mask, **call)
        with pytest.raises(ValueError, match="attention_mask must be None"):
            module(groups.input_ids[None], mask, **call)
    assert model(groups.input_ids[None], **call).logits.shape[:2] == (1, groups.num_tokens)
    model.set_attn_implementation("eager")  # without groups masks are transformers' own affair
    model(groups.input_ids[None], attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("count", [2, 7, 64])
def test_samples_of_one_prompt_score_as_rows_of_their_own(count: int):
    """K completions, one prompt: the same log-probs as K rows, whatever K."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    completions = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]
    groups = PackedGroups.pack([Group(list(range(3, 40)), completions), Group([9], completions[:2])])
    for name in ("gemma2", "smollm3"):
        model = _model(name)
        with torch.no_grad():
            torch.testing.assert_close(packed_logp(model, groups), separate_logp(model, groups), **TOLERANCE)


def test_shared_prompt_equals_repeated_prompt():
    model, groups = _model("llama"), _groups(loss_masks=False)
    repeated = [Group(group.prompt, [completion]) for group in groups for completion in group.completions]
    shared_logp = packed_logp(model, PackedGroups.pack(groups))
    torch.testing.assert_close(shared_logp, packed_logp(model, PackedGroups.pack(repeated)), **TOLERANCE)


def test_masked_tokens_have_no_influence():
    """A masked last token changes neither loss nor gradients, whatever it is."""
    model, tokens = _model("llama"), [5, 6, 7]
    results = []
    for last in (8, 40):
        completions = [[*tokens, last], [9, 10]]
        groups = PackedGroups.pack([Group([3, 4], completions, [[True, True, True, False], [True, True]])])
        results.append(_loss_and_gradients(model, packed_logp(model, groups), groups))
    torch.testing.assert_close(*results)


def test_gradient_checkpointing_carries_the_groups():
    model, groups = _model("qwen3"), PackedGroups.pack(_groups())
    expected = _loss_and_gradients(model, packed_logp(model, groups), groups)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(_loss_and_gradients(model, packed_logp(model, groups), groups), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_torch_compile_makes_no_graph_for_every_row(name: str):
    model, graphs = _model(name), []
    # PyTorch makes sizes of 1, and sizes that are equal by chance, constants: a row of a single tile is a second graph,
    # and so would be those after a first one with as many segments as tiles have columns.
    rows = [PackedGroups.pack(_groups()[picked]) for picked in (slice(2), slice(3), slice(1, 4), slice(1))]
    expected = [_loss_and_gradients(model, packed_logp(model, groups), groups) for groups in rows]

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.model.compile(backend=counting, fullgraph=True, dynamic=True)
    for groups, values in zip(rows, expected, strict=True):
        torch.testing.assert_close(_loss_and_gradients(model, packed_logp(model, groups), groups), values, **TOLERANCE)
    assert len(graphs) == 2


def _liger(name: str, model) -> None:
    """Liger's RMSNorm, RoPE and SwiGLU in the model."""
    from liger_kernel.transformers import monkey_patch

    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, rope=True, rms_norm=True, **losses)


@pytest.fixture(params=["llama", "qwen3", "gemma2"])
def liger_model(request, monkeypatch):
    """A model, and a restore of what Liger changes in its module."""
    pytest.importorskip("liger_kernel")
    model = _model(request.param)
    module = importlib.import_module(type(model).__module__)
    for attribute, value in list(vars(module).items()):
        if isinstance(value, (type, FunctionType)):
            monkeypatch.setattr(module, attribute, value)
    return request.param, model


def test_ligers_layers_run_packed(liger_model, monkeypatch):
    """Liger's patches are applied; plain PyTorch replaces its kernels, which need a GPU."""
    name, model = liger_model
    groups, called = PackedGroups.pack(_groups()), set()
    expected = _loss_and_gradients(model, packed_logp(model, groups), groups)
    from liger_kernel.transformers import geglu, rms_norm, rope, swiglu

    def norm(x, weight, eps, offset, *_):
        called.add("norm")
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)

    def gated(act):
        def product(gate, up):
            called.add("mlp")
            return act(gate) * up

        return product

    def rotate(_, q, k, cos, sin, *__):
        called.add("rope")
        return _rotate(q, k, cos, sin)

    monkeypatch.setattr(rms_norm.LigerRMSNormFunction, "apply", norm)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", gated(F.silu))
    monkeypatch.setattr(geglu.LigerGELUMulFunction, "apply", gated(partial(F.gelu, approximate="tanh")))
    monkeypatch.setattr(rope, "dispatch", rotate)
    _liger(name, model)
    torch.testing.assert_close(_loss_and_gradients(model, packed_logp(model, groups), groups), expected, **TOLERANCE)
    assert called == {"norm", "mlp", "rope"}


def _rotate(q, k, cos, sin):
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ligers_kernels_run_packed_on_a_gpu(liger_model):
    name, model = liger_model
    model, groups = model.cuda(), PackedGroups.pack(_groups(), device="cuda")
    with torch.device("cuda"):
        expected = _loss_and_gradients(model, packed_logp(model, groups), groups)
        _liger(name, model)
        found = _loss_and_gradients(model, packed_logp(model, groups), groups)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_keeps_its_own_backend():
    """Triton's backend needs a GPU: the error shows that it was selected."""
    groups, model, other = PackedGroups.pack(_groups()), _model("llama"), _model("llama")
    register(model, "triton")
    register(other)
    with pytest.raises(ValueError, match="attention backend triton"):
        packed_logp(model, groups)
    assert packed_logp(other, groups).isfinite().all()


def test_missing_groups_and_unknown_keywords_raise():
    model, groups = _model("llama"), PackedGroups.pack(_groups())
    model.set_attn_implementation(register())
    ids = groups.input_ids[None]
    with pytest.raises(ValueError, match="groups="):
        model(input_ids=ids, use_cache=False)
    mask = torch.ones(1, 1, groups.num_tokens, groups.num_tokens)
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=ids, attention_mask=mask, groups=groups, use_cache=False)
    with pytest.raises(ValueError, match="surprise"):
        model(input_ids=ids, groups=groups, surprise=1, use_cache=False)
    q = torch.zeros(1, 4, groups.num_tokens, 8)
    with pytest.raises(ValueError, match="dropout"):
        attention_forward(model, q, q, q, None, dropout=0.1, groups=groups)
    with pytest.raises(ValueError, match="s_aux"):
        attention_forward(model, q, q, q, None, groups=groups, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="causal"):
        attention_forward(model, q, q, q, None, groups=groups, is_causal=False)
    with pytest.raises(ValueError, match="q must be"):
        attention_forward(model, q[:, :, 1:], q, q, None, groups=groups)
