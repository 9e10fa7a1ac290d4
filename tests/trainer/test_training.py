import copy
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stagecalls import dpo, reference, sft
from training import Log, largest_difference, recipe_of, select_of, stage_in, weights_of
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

from strop.kernels import Group, _cpu, linear_logprob, optimizer
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.tables import write_table
from strop.trainer.run.world import World
from strop.trainer.stages.sft import load_examples
from strop.trainer.training.batch import Example, collate
from strop.trainer.training.engine import learning_rate
from strop.trainer.training.local import Engine
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.pairs import ReferenceTable, load_pairs

CPU = torch.device("cpu")


def run_sft(tmp_path, name, model, log=None, n=12, **keys):
    recipe = recipe_of(sft={"batch_size": 4, "lr": 1e-3, "epochs": 2} | keys)
    stage = stage_in(tmp_path / name, "round-00/sft", log)
    sft(stage, recipe, select=select_of(tmp_path / "select", n), start=model)
    return stage


def run_dpo(tmp_path, name, model, log=None, dtype="float32", ref=None, n=12, columns=None, **keys):
    recipe = recipe_of(dtype=dtype, dpo={"batch_size": 4, "lr": 1e-3} | keys)
    select = select_of(tmp_path / "select", n, **(columns or {}))
    table = stage_in(tmp_path / f"{name}-reference", "round-00/reference")
    reference(table, recipe, select=select, model=ref or model)
    stage = stage_in(tmp_path / name, "round-00/dpo", log or Log())
    dpo(stage, recipe, select=select, policy=model, reference=table.dir, same_weights=ref is None)
    return stage


def gradients(tmp_path, model, rows, max_tokens):
    """Gradients and loss of one SFT step of all rows, in microbatches of at most max_tokens."""
    recipe = recipe_of(sft={"batch_size": rows, "max_tokens": max_tokens, "grad_clip": 0.0, "epochs": 1})
    kept = {}

    class Keeping(Engine):
        def step(self):
            kept.update({n: g.clone() for n, g in zip(self.names, self.weights.gradients(), strict=True)})
            return super().step()

    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.trainer.training.local.Engine", Keeping)
        sft(stage_in(tmp_path / f"g{max_tokens}", "sft", log), recipe, select=select_of(tmp_path / "select", rows),
            start=model)
    return kept, log.rows[0]["loss"]


def test_one_microbatch_of_all_rows_equals_rows_one_by_one(tmp_path, tiny_model):
    together, loss = gradients(tmp_path, tiny_model, 8, 4096)
    apart, loss_apart = gradients(tmp_path, tiny_model, 8, 21)
    assert abs(loss - loss_apart) < 1e-5
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-5, atol=1e-5)


def test_sft_loss_is_the_mean_over_loss_tokens_of_separate_rows(tmp_path, tiny_model):
    _, loss = gradients(tmp_path, tiny_model, 8, 4096)
    model = ModelFolder(tiny_model).load(torch.float32, CPU, "sdpa")
    total = count = 0
    for e in load_examples(stage_in(tmp_path / "x", "sft"), tmp_path / "select" / "sft.parquet", 4096):
        row = torch.tensor([[*e.group.prompt, *e.group.completions[0]]])
        logp = model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        mask = torch.tensor([False] * (len(e.group.prompt) - 1) + list(e.group.loss_masks[0]))
        total, count = total - logp[mask].sum().item(), count + int(mask.sum())
    assert abs(loss - total / count) < 1e-5


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, tiny_model):
    for kind in (run_sft, run_dpo):
        whole = kind(tmp_path, f"{kind.__name__}-whole", tiny_model, checkpoint_steps=1, ema_decay=0.9, snapshots=1)
        with pytest.raises(KeyboardInterrupt):
            kind(tmp_path, f"{kind.__name__}-killed", tiny_model, Log(stop_at=2), checkpoint_steps=1, ema_decay=0.9,
                 snapshots=1)
        log = Log()
        again = kind(tmp_path, f"{kind.__name__}-killed", tiny_model, log, checkpoint_steps=1, ema_decay=0.9,
                     snapshots=1)
        assert log.rewound_to == 1 and len(log.rows) == again.counts["steps"] - 1
        for part in ("model", "ema"):
            assert largest_difference(whole.dir / part, again.dir / part) == 0.0
        assert [p.name for p in (whole.dir / "snapshots").iterdir()] == \
            [p.name for p in (again.dir / "snapshots").iterdir()] != []
        assert largest_difference(whole.dir / "model", tiny_model) > 1e-4


def test_bema_equals_trls_and_survives_a_kill(tmp_path, tiny_model, monkeypatch):
    from trl import BEMACallback

    seen, step = [], Engine.step

    def recorded(engine):
        result = step(engine)
        seen.append([m.detach().clone() for m in engine.masters])
        return result

    keys = {"epochs": 2, "checkpoint_steps": 1, "bema": True, "bema_bias_power": 0.3, "bema_ema_power": 0.6,
            "bema_lag": 4}
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", recorded)
        whole = run_dpo(tmp_path, "whole", tiny_model, **keys)
    theirs = BEMACallback(update_freq=1, ema_power=0.6, bias_power=0.3, lag=4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs.on_train_begin(None, None, None, model)
    for number, weights in enumerate(seen, 1):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        theirs.on_step_end(None, TrainerState(global_step=number), None, model)
    found = dict(AutoModelForCausalLM.from_pretrained(whole.dir / "ema").named_parameters())
    for name, value in theirs.running_model.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert len(seen) > 3 and largest_difference(whole.dir / "ema", whole.dir / "model") > 1e-5
    with pytest.raises(KeyboardInterrupt):
        run_dpo(tmp_path, "killed", tiny_model, Log(stop_at=2), **keys)
    again = run_dpo(tmp_path, "killed", tiny_model, **keys)
    assert largest_difference(whole.dir / "ema", again.dir / "ema") == 0.0


def test_dpo_starts_at_ln_2_with_no_margin(tmp_path, tiny_model):
    log = Log()
    run_dpo(tmp_path, "dpo", tiny_model, log, epochs=6)
    assert abs(log.rows[0]["loss"] - math.log(2)) < 1e-5 and abs(log.rows[0]["rewards/margins"]) < 1e-5
    assert log.rows[-1]["loss"] < math.log(2) - 1e-3 and log.rows[-1]["rewards/margins"] > 0


def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("margin, keys, expected", [
    (None, {}, 0.1109),  # the scores differ by 1
    (2.0, {}, kl(1 / (1 + math.exp(-2)), 0.5)),  # ready data's own margin
    (2.0, {"rpo_eta": 0.5}, 0.1109),
    (None, {"rpo_divergence": "policy_first"}, kl(0.5, 1 / (1 + math.exp(-1)))),
    (None, {"rpo_divergence": "squared", "rpo_eta": 3.0}, 9.0),
])
def test_rpo_starts_at_the_divergence_of_even_odds_from_the_scores(tmp_path, tiny_model, margin, keys, expected):
    log = Log()
    run_dpo(tmp_path, "dpo", tiny_model, log, columns={"margin": margin}, loss="rpo", epochs=6, **keys)
    assert log.rows[0]["loss"] == pytest.approx(expected, abs=6e-5)
    assert log.rows[-1]["loss"] < log.rows[0]["loss"] and log.rows[-1]["rewards/margins"] > 0


def test_rpo_refuses_pairs_without_scores(tmp_path, tiny_model):
    recipe = recipe_of(dpo={"loss": "rpo"})
    select = select_of(tmp_path / "select", 3, margin=None)
    rows = pq.read_table(select / "pairs.parquet").to_pylist()
    rows[1] |= {"chosen_score": None, "rejected_score": None}
    write_table(select / "pairs.parquet", pa.Table.from_pylist(rows))
    with pytest.raises(UserError, match=r"1 of 3 pairs \(first: r001\) have no scores, which dpo.loss=rpo needs"):
        dpo(stage_in(tmp_path / "dpo", "round-00/dpo"), recipe, select=select, policy=tiny_model,
            reference=tmp_path, same_weights=True)


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory):
    """Wide enough that bf16 matrix products of other shapes round otherwise, where the processor has them."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 64,
                   "initializer_range": 0.05})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": True}, {"lora": {"rank": 4}}], ids=str)
def test_in_bf16_step_zero_is_exact(tmp_path, wide_model, monkeypatch, keys):
    """The reference ran in the very microbatches of the steps, so not even rounding differs."""
    seen, log = [], Log()
    monkeypatch.setattr("strop.trainer.stages.preference.step_zero",
                        lambda logp, ref, *_: seen.append(logp.equal(ref)) or 0.0)
    lora, keys = {"lora": keys["lora"]} if "lora" in keys else {}, {k: v for k, v in keys.items() if k != "lora"}
    recipe = recipe_of(dtype="bfloat16", dpo={"batch_size": 5, "max_tokens": 64} | keys, **lora)
    select, table = select_of(tmp_path / "select", 20), stage_in(tmp_path / "reference", "reference")
    reference(table, recipe, select=select, model=wide_model)
    dpo(stage_in(tmp_path / "dpo", "dpo", log), recipe, select=select, policy=wide_model, reference=table.dir,
        same_weights=True)
    assert seen and all(seen)
    assert abs(log.rows[0]["loss"] - math.log(2)) < 1e-7 and log.rows[0]["rewards/margins"] == 0.0


def test_step_zero_warns_once_where_rounding_differs(tmp_path, tiny_model, monkeypatch):
    """A reference that another number of processes made passes with a word."""
    def rounds_otherwise(*args):
        scorer = Scorer(*args)
        return lambda groups: scorer(groups) + 1e-3

    monkeypatch.setattr("strop.trainer.stages.reference.Scorer", rounds_otherwise)
    recipe, warned = recipe_of(dtype="bfloat16", dpo={"batch_size": 20, "max_tokens": 48}), []
    select, table = select_of(tmp_path / "select", 20), stage_in(tmp_path / "reference", "reference")
    reference(table, recipe, select=select, model=tiny_model)
    stage = stage_in(tmp_path / "dpo", "dpo")
    stage.console.warn = warned.append
    dpo(stage, recipe, select=select, policy=tiny_model, reference=table.dir, same_weights=True)
    assert len(warned) == 1 and "another number of processes" in warned[0]


def test_step_zero_stops_on_a_reference_of_other_weights(tmp_path, tiny_model):
    moved = run_sft(tmp_path, "moved", tiny_model, lr=1e-2).dir / "model"
    select, recipe = tmp_path / "select", recipe_of(dpo={"batch_size": 4})
    table = stage_in(tmp_path / "reference", "reference")
    reference(table, recipe, select=select, model=moved)
    with pytest.raises(UserError, match="step 0: policy and reference are the same weights, but"):
        dpo(stage_in(tmp_path / "dpo", "dpo"), recipe, select=select, policy=tiny_model, reference=table.dir,
            same_weights=True)


def test_cached_reference_equals_a_live_one(tmp_path, tiny_model):
    moved = run_sft(tmp_path, "moved", tiny_model).dir / "model"
    recipe = recipe_of(dpo={"max_tokens": 64})
    table = stage_in(tmp_path / "reference", "reference")
    reference(table, recipe, select=tmp_path / "select", model=moved)
    pairs = load_pairs(table, tmp_path / "select" / "pairs.parquet", recipe.dpo, 512, record=True)
    indices = list(range(len(pairs)))[::-1]  # another order and another packing than the table was made with
    live = Scorer(ModelFolder(moved).load(torch.float32, CPU))(collate(pairs, indices, CPU)).detach()
    cached = ReferenceTable(table.dir / "reference.parquet").of(pairs, indices, CPU)
    torch.testing.assert_close(cached, live, rtol=0, atol=1e-5)
    other = [Example(p.row_id, Group([5, *p.group.prompt], p.group.completions, p.group.loss_masks)) for p in pairs]
    with pytest.raises(UserError, match="is missing or has other tokens or masks"):
        ReferenceTable(table.dir / "reference.parquet").of(other, [0], CPU)


def test_template_tokens_have_no_influence_when_masked(tmp_path, tiny_model):
    recipe, plain = recipe_of(), recipe_of(dpo={"mask_template_tokens": False})
    stage = stage_in(tmp_path / "s", "dpo")
    path = select_of(tmp_path / "select") / "pairs.parquet"
    masked, whole = (load_pairs(stage, path, r.dpo, 512, record=False) for r in (recipe, plain))
    longer = [p for p in whole if len(p.group.completions[0]) > 1]
    assert all(p.targets()[0] == len(p.group.completions[0]) for p in whole) and longer
    assert all(m.targets()[0] == len(m.group.completions[0]) - (len(m.group.completions[0]) > 1) for m in masked)


def test_drops_are_counted_not_silent(tmp_path, tiny_model):
    select = select_of(tmp_path / "select")
    stage = stage_in(tmp_path / "s", "dpo")
    kept = load_pairs(stage, select / "pairs.parquet", recipe_of(dpo={"max_length": 14}).dpo, 512, record=True)
    assert stage.counts["dropped/overlong"] == 12 - len(kept) > 0
    with pytest.raises(UserError, match="no row is left to train on"):
        load_examples(stage, select / "sft.parquet", 2)


def in_bf16(model, tmp_path):
    start = tmp_path / "bf16"
    ModelFolder(model).load(torch.bfloat16, CPU, "sdpa").save_pretrained(start)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, start)
    return start


def masters_after(tmp_path, name, start, **keys):
    """fp32 masters by name at the end of a DPO run."""
    kept = {}

    class Keeping(Engine):
        def save(self, target):
            kept.update({n: m.detach().clone() for n, m in zip(self.names, self.masters, strict=True)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.trainer.training.local.Engine", Keeping)
        run_dpo(tmp_path, name, start, **keys)
    return kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_tokens", [4096, 48], ids=["one microbatch", "several"])
def test_adamw_in_one_pass_equals_pytorchs(tmp_path, tiny_model, monkeypatch, dtype, max_tokens):
    if not optimizer.available([torch.zeros(1)]):
        pytest.skip("csrc/cpu.cpp was not built for this processor")
    start = in_bf16(tiny_model, tmp_path)
    keys = {"dtype": dtype, "max_tokens": max_tokens, "grad_clip": 0.1, "weight_decay": 0.1}
    ours = masters_after(tmp_path, "ours", start, **keys)
    monkeypatch.setattr(optimizer, "available", lambda _: False)
    plain = masters_after(tmp_path, "plain", start, **keys)
    before = weights_of(start)
    for name, value in plain.items():
        moved, apart = (value - before[name].float()).norm(), (value - ours[name]).norm()
        assert moved > 0 and apart < (1e-3 if dtype == "float32" else 3e-2) * moved, (name, moved, apart)


def test_bf16_moves_the_weights_as_fp32_does(tmp_path, tiny_model):
    start = in_bf16(tiny_model, tmp_path)
    moved = {}
    for dtype in ("float32", "bfloat16"):
        kept = masters_after(tmp_path, dtype, start, dtype=dtype, lr=5e-7, epochs=34, schedule="constant",
                             warmup_ratio=0.0)
        before = {k: v.float() for k, v in weights_of(start).items()}
        moved[dtype] = math.sqrt(sum((kept[k] - before[k]).square().sum().item() for k in kept))
    assert moved["float32"] > 0 and abs(moved["bfloat16"] / moved["float32"] - 1) < 0.05, moved


def test_schedule():
    section = recipe_of(sft={"lr": 1.0, "warmup_ratio": 0.1, "min_lr_ratio": 0.1}).sft
    rates = [learning_rate(i, 100, section) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(55, 100, section.model_copy(update={"schedule": "linear"})) == pytest.approx(0.55)


def test_activation_checkpointing_changes_nothing(tmp_path, tiny_model):
    plain = run_sft(tmp_path, "plain", tiny_model)
    checkpointed = run_sft(tmp_path, "checkpointed", tiny_model, activation_checkpointing=True)
    assert largest_difference(plain.dir / "model", checkpointed.dir / "model") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": True}, {"eval_steps": 2}], ids=str)
def test_compiled_layers_change_nothing(tmp_path, tiny_model, keys):
    plain = run_sft(tmp_path, "plain", tiny_model, **keys)
    compiled = run_sft(tmp_path, "compiled", tiny_model, compile=True, **keys)
    assert largest_difference(plain.dir / "model", compiled.dir / "model") < 1e-4


def test_layers_of_a_gpu_are_fused_for_training(tiny_model, monkeypatch):
    """Not for inference, whose layers have no gradients."""
    fused = []
    monkeypatch.setattr("strop.kernels.integrations.transformers._fuse_with_liger", fused.append)
    model = ModelFolder(tiny_model).load(torch.float32, torch.device("cuda"), on_host=True)
    assert fused == [model]
    ModelFolder(tiny_model).load(torch.float32, torch.device("cuda"), on_host=True, fuse=False)
    assert len(fused) == 1


def test_a_layer_that_does_not_compile(tmp_path, tiny_model, monkeypatch):
    def compile(layer, **options):
        def fails(*_, **__):
            raise RuntimeError("no compiler here")

        layer._compiled_call_impl = fails

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    with pytest.raises(UserError, match=r"compile fails on LlamaForCausalLM .*no compiler here.*sft\.compile=false"):
        run_sft(tmp_path, "compiled", tiny_model, compile=True)


def test_separate_rows_train_like_packed_ones(tmp_path, tiny_model, monkeypatch):
    packed, apart = Log(), Log()
    run_dpo(tmp_path, "packed", tiny_model, packed)

    def refuses(model, *_):
        model.set_attn_implementation("sdpa")
        return False

    monkeypatch.setattr("strop.trainer.stages.preference.probe", refuses)
    run_dpo(tmp_path, "apart", tiny_model, apart)
    for a, b in zip(packed.rows, apart.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("loss", ["sigmoid_norm", "robust", "ipo", "hinge", "dpop", "nca_pair", "apo_zero", "apo_down",
                                  "discopop", "sppo_hard", "exo_pair"])
def test_every_loss_of_the_recipe_trains(tmp_path, tiny_model, loss):
    log = Log()
    run_dpo(tmp_path, loss, tiny_model, log, loss=loss, n=4,
            label_smoothing=0.1 if loss in ("robust", "exo_pair") else 0.0)
    assert all(math.isfinite(r["loss"]) for r in log.rows)


def test_lora_trains_adapters_only_and_hands_over_whole_weights(tmp_path, tiny_model):
    pytest.importorskip("peft")
    recipe = recipe_of(sft={"batch_size": 4, "lr": 1e-2}, lora={"rank": 4})
    stage = stage_in(tmp_path / "lora", "sft")
    sft(stage, recipe, select=select_of(tmp_path / "select"), start=tiny_model)
    before, after = weights_of(tiny_model), weights_of(stage.dir / "model")
    assert before.keys() == after.keys() and (stage.dir / "model" / "adapter" / "adapter_config.json").exists()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and not any("embed" in k or "norm" in k for k in changed)
    bad = recipe_of(lora={"rank": 4, "target_modules": ["lm_head"]})
    with pytest.raises(UserError, match="an adapter on the head is not supported"):
        sft(stage_in(tmp_path / "bad", "sft"), bad, select=tmp_path / "select", start=tiny_model)


def test_not_finite_stops_and_names_the_rows(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("strop.trainer.training.logprobs.linear_logprob",
                        lambda *a, **k: _broken(linear_logprob(*a, **k)))
    with pytest.raises(UserError, match=r"step 1: loss=nan and grad_norm=nan must be finite; its batch \(rows r0"):
        run_sft(tmp_path, "nan", tiny_model)


def _broken(result):
    return (result[0] * float("nan"), result[1]) if isinstance(result, tuple) else result  # spares the probe


def test_a_run_says_where_the_kernels_for_a_cpu_lack(monkeypatch):
    monkeypatch.setattr(_cpu, "load", lambda: True)
    assert World().hardware == "cpu"
    monkeypatch.setattr(_cpu, "load", lambda: False)
    assert "without csrc/cpu.cpp" in World().hardware and "g++" in World().hardware


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged_weights_are_those_of_peft_without_a_copy_of_the_model(tmp_path, tiny_model, monkeypatch, dtype,
                                                                      modules):
    pytest.importorskip("peft")
    recipe = recipe_of(dtype=dtype, lora={"rank": 4, "target_modules": modules})
    engine = Engine(ModelFolder(tiny_model), recipe.sft, stage_in(tmp_path / "s", "sft"), 8, compute=recipe,
                    lora=recipe.lora, seed=0)
    with torch.no_grad():
        for name, p in engine.model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    deepcopy = copy.deepcopy
    expected = deepcopy(engine.model).merge_and_unload().state_dict()

    def copy_of(x, *memo):
        assert not isinstance(x, torch.nn.Module)
        return deepcopy(x, *memo)

    monkeypatch.setattr(copy, "deepcopy", copy_of)
    engine.save(tmp_path / "model")
    monkeypatch.undo()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=engine.dtype).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=engine.dtype).state_dict()
    assert any(not torch.equal(found[name], untrained[name]) for name in untrained)
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()


def test_adapters_compute_in_the_models_dtype_over_fp32_masters(tmp_path, tiny_model):
    """fp32 adapters would cast the input of every linear layer up and its result down."""
    pytest.importorskip("peft")
    recipe = recipe_of(dtype="bfloat16", lora={"rank": 4})
    engine = Engine(ModelFolder(tiny_model), recipe.sft, stage_in(tmp_path / "s", "sft"), 8, compute=recipe,
                    lora=recipe.lora, seed=0)
    assert {p.dtype for p in engine.weights.params} == {torch.bfloat16}
    assert {m.dtype for m in engine.masters} == {torch.float32}
