"""StropDPOTrainer against trl.DPOTrainer, step by step, on tiny random models."""

import copy
import importlib
import json
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import character_tokenizer
from forked import in_a_fork

pytest.importorskip("trl")
import transformers as hf
import trl
from datasets import Dataset, load_from_disk
from trl.trainer import utils as trl_utils

from strop.kernels import linear_logprob
from strop.kernels.integrations import trl as ours
from strop.kernels.integrations.trl import StropDPOTrainer

ROWS = [
    {"prompt": "say 3 or 4: ", "chosen": "3", "rejected": "four, I think"},
    {"prompt": "what is left of twelve, less seven?", "chosen": "five is left", "rejected": "6"},
    {"prompt": "no", "chosen": "yes", "rejected": "yes and no"},
    {"prompt": "spell cat", "chosen": "c-a-t", "rejected": "k-a-t!"},
    {"prompt": "more", "chosen": "most", "rejected": "less, if you please"},
]
HEADS = {
    "llama": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "phi": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
}
CLASSES = {"llama": "Llama", "cohere": "Cohere", "granite": "Granite", "gemma2": "Gemma2", "phi": "Phi"}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def model_of(tokenizer, name: str = "llama", seed: int = 0, **options):
    config = getattr(hf, f"{CLASSES.get(name, name.title())}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **HEADS.get(name, {}) | options,
    )
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head.bias is not None:  # which starts at zero
        torch.nn.init.normal_(head.bias)
    return model


def moved(model):
    """A reference: the same model, slightly perturbed."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.01)
    return model


def trainer_of(cls, tokenizer, folder, model, ref_model=None, peft_config=None, rows=ROWS, **options):
    args = {
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return cls(
        model,
        ref_model=ref_model,
        args=trl.DPOConfig(output_dir=str(folder), **args | options),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]) if options.get("eval_strategy") else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@contextmanager
def only_its_head(trainer):
    """TRL's head fails where StropDPOTrainer would use it, and ours where DPOTrainer would."""
    strop = trainer is StropDPOTrainer or isinstance(trainer, StropDPOTrainer)
    owner, name = (trl_utils._ChunkedLogProbFunction, "apply") if strop else (ours, "linear_logprob")
    with mock.patch.object(owner, name, side_effect=AssertionError("the other trainer's head")):
        yield


@pytest.fixture
def both(tokenizer, tmp_path):
    """both(model, with_reference, **options) -> the trainers, TRL's and ours, with equal weights."""

    def make(model, with_reference=True, **options):
        trainers = []
        for cls in (trl.DPOTrainer, StropDPOTrainer):
            torch.manual_seed(0)  # adapters start at random
            with only_its_head(cls):
                reference = moved(model) if with_reference else None
                trainers.append(trainer_of(cls, tokenizer, tmp_path, copy.deepcopy(model), reference, **options))
        return trainers

    return make


def same_numbers(theirs: dict, strop: dict, tolerance: float = 2e-5) -> None:
    assert list(theirs) == list(strop)
    for name in theirs:
        if not name.endswith(("runtime", "per_second")):
            assert strop[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


def same_tensors(theirs: dict, strop: dict, **tolerance) -> None:
    assert theirs.keys() == strop.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(strop[name], expected, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def same_training(theirs, strop, tolerance: float = 2e-5) -> None:
    """Trains both: every number of every step and the trained weights are the same."""
    start = copy.deepcopy(strop.model.state_dict())
    for trainer in (theirs, strop):
        with only_its_head(trainer):
            trainer.train()
    assert len(theirs.state.log_history) == len(strop.state.log_history) >= 4
    for expected, found in zip(theirs.state.log_history, strop.state.log_history, strict=True):
        same_numbers(expected, found, tolerance)
    margins = [logged["rewards/margins"] for logged in theirs.state.log_history if "rewards/margins" in logged]
    assert abs(margins[-1]) > 1e-3  # not a comparison of zeros
    weights = strop.model.state_dict()
    same_tensors(theirs.model.state_dict(), weights, rtol=0, atol=tolerance)
    trained = [n for n, p in strop.model.named_parameters() if p.requires_grad]
    assert trained and all((weights[n] - start[n]).abs().max() > 1e-4 for n in trained if "embed" not in n)


def same_step(theirs, strop, tolerance: float = 2e-5) -> None:
    """One batch: loss, metrics and the gradients of all parameters are the same."""
    batch = theirs.data_collator(list(theirs.train_dataset))
    losses, logged = [], []
    for trainer in (theirs, strop):
        trainer.model.train()
        with only_its_head(trainer):
            losses.append(trainer.compute_loss(trainer.model, dict(batch)))
            losses[-1].backward()
        trainer.log({})
        logged.append(trainer.state.log_history[-1])
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    same_numbers(*logged, tolerance)
    assert "entropy" in logged[1] and "mean_token_accuracy" in logged[1]
    # In units of the largest gradient TRL's own are up to 2.2e-5 from those in fp64 (discopop), ours up to 0.9e-5.
    theirs, strop = ({n: p.grad for n, p in t.model.named_parameters() if p.requires_grad} for t in (theirs, strop))
    assert all(g is not None for g in theirs.values())
    largest = max(g.abs().max().item() for g in theirs.values())
    assert largest > 0
    same_tensors(theirs, strop, rtol=0, atol=2 * tolerance * largest)


TRAINING = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_length": 24},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "precomputed, ld_alpha": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "loss_type": "ipo"},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
def test_training_is_trls(both, tokenizer, options):
    same_training(*both(model_of(tokenizer), **options))


def test_bf16_is_trls_within_rounding(both, tokenizer):
    same_training(*both(model_of(tokenizer), bf16=True), tolerance=0.05)
    same_step(*both(model_of(tokenizer).bfloat16()), tolerance=0.01)


@pytest.mark.slow
def test_compiled_models_train_as_trls(both, tokenizer):
    same_training(*both(model_of(tokenizer), torch_compile=True, torch_compile_backend="aot_eager"))


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head trained whole": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_train_as_trls(both, tokenizer, options, precomputed):
    peft = pytest.importorskip("peft")
    model = model_of(tokenizer, tie_word_embeddings=False)
    theirs, strop = both(
        model,
        with_reference=False,
        peft_config=peft.LoraConfig(**options),
        learning_rate=1e-2,
        precompute_ref_log_probs=precomputed,
    )
    same_training(theirs, strop)
    # The reference is still what it was: the weights without adapters, the head's first ones included.
    batch = strop.data_collator(list(strop.train_dataset))
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    truth = (logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * mask).sum(1)
    found = torch.cat(strop.compute_ref_log_probs(strop.model, batch))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-4)


def test_a_trained_adapter_is_its_own_reference(both, tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of(tokenizer), peft.LoraConfig(init_lora_weights=False))
    same_training(*both(model, with_reference=False, learning_rate=1e-2))


OPTIONS = [
    *({"loss_type": name} for name in ours._LOSSES if name != "exo_pair"),
    {"loss_type": ["robust", "exo_pair"], "label_smoothing": 0.1, "beta": 0.3},
    {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.2, "ld_alpha": 0.3},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sft", "sft", "apo_zero"], "loss_weights": [0.5, 0.25, 1.0], "ld_alpha": 0.3},
    {"loss_type": ["discopop", "sigmoid_norm"], "f_divergence_type": "js_divergence", "discopop_tau": 0.1},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    {"ld_alpha": 0.0},
    {"use_weighting": True, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.1]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_loss_and_option_is_trls(both, tokenizer, options):
    same_step(*both(model_of(tokenizer), **options))


@pytest.mark.parametrize("name", HEADS)
def test_heads_with_scales_caps_and_bias(both, tokenizer, name):
    same_step(*both(model_of(tokenizer, name)))


def test_reference_sums_under_ld_alpha_with_an_empty_completion():
    segments = torch.tensor([0, 0, 0, 1, 3, 3, 4, 5, 5, 6])  # completions 2 and 7 are empty
    sums = torch.tensor([-3.0, -1.0, 0.0, -2.0, -4.0, -5.0, -0.5, 0.0])
    tokens = ours._sums_as_tokens(sums, segments, 0.25)
    weights = torch.tensor([1, 0.25, 0.25, 1, 0.25, 0.25, 1, 1, 0.25, 0.25])
    torch.testing.assert_close(torch.zeros(8).index_add(0, segments, tokens * weights), sums)


def test_only_completions_go_through_the_head_and_nothing_to_the_host(tokenizer, tmp_path, monkeypatch):
    model = model_of(tokenizer)
    trainer = trainer_of(StropDPOTrainer, tokenizer, tmp_path, model, moved(model))
    batch = trainer.data_collator(list(trainer.train_dataset))
    rows = []

    def counted(hidden, *args, **options):
        rows.append(hidden.shape[0])
        return linear_logprob(hidden, *args, **options)

    def refused(*_):
        raise AssertionError("a transfer to the host")

    monkeypatch.setattr(ours, "linear_logprob", counted)
    for name in ("item", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    monkeypatch.undo()
    assert rows == [batch["completion_mask"].sum().item()] * 2
    trainer.log({})
    assert trainer.state.log_history[-1]["num_tokens"] == batch["attention_mask"].sum().item()


def test_precomputed_logps_are_kept_apart_by_what_they_depend_on(tokenizer, tmp_path):
    """Without max_length TRL's cache file is the same for any ld_alpha, and for its own head; with keep_end for any
    max_length."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")  # data in memory have no cache
    rows, model, found = load_from_disk(tmp_path / "rows"), model_of(tokenizer), []
    options = {"precompute_ref_log_probs": True, "rows": rows, "max_length": None, "truncation_mode": "keep_end"}
    for cls, changed in (
        (trl.DPOTrainer, {}),
        (StropDPOTrainer, {}),
        (StropDPOTrainer, {"ld_alpha": 0.5}),
        (StropDPOTrainer, {"max_length": 20}),
        (StropDPOTrainer, {}),
    ):
        with mock.patch.object(ours, "linear_logprob", side_effect=linear_logprob) as head:
            trainer = trainer_of(cls, tokenizer, tmp_path, model, **options | changed)
        found.append((head.call_count, list(trainer.train_dataset["ref_rejected_logps"])))
    (none, theirs), (calls, strop), (_, ld_alpha), (_, cut), (cached, again) = found
    assert none == 0 and calls == 4 and cached == 1  # one call for the look at the head, three for the batches
    assert strop == pytest.approx(theirs, abs=1e-4) and again == strop
    assert ld_alpha != strop and cut != strop


def test_wpo_with_hinge_has_a_gradient(tokenizer, tmp_path):
    """TRL's version overwrites what its backward needs."""
    model = model_of(tokenizer)
    trainer = trainer_of(
        StropDPOTrainer, tokenizer, tmp_path, model, moved(model), use_weighting=True, loss_type="hinge"
    )
    trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset))).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_generation_and_logits_are_the_models_own(tokenizer, tmp_path):
    model = model_of(tokenizer)
    ids = torch.tensor([tokenizer("say 3")["input_ids"]])
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    loss = model(ids, labels=ids).loss
    trainer = trainer_of(StropDPOTrainer, tokenizer, tmp_path, model, moved(model))
    assert torch.equal(model(ids).logits, logits) and torch.equal(model(ids, labels=ids).loss, loss)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), text)
    assert trl.trainer.dpo_trainer.add_fused_lm_head is trl_utils.add_fused_lm_head
    batch = trainer.data_collator(list(trainer.train_dataset))
    _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


class Halved(hf.LlamaForCausalLM):
    """Scales its logits without a config attribute."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits / 2
        return found


def lora(*modules, **options):
    return pytest.importorskip("peft").LoraConfig(target_modules=list(modules), **options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("TRL ignores it for 'sigmoid'", {"label_smoothing": 0.1}),
        ("label_smoothing would be ignored", {"label_smoothing": 0.1, "loss_type": "hinge"}),
        ("weights pairs", {"use_weighting": True, "loss_type": ["sigmoid", "sft"]}),
        ("cancel each other", {"ld_alpha": 0.5, "loss_type": "ipo"}),
        ("unknown loss_type 'kto'", {"loss_type": "kto"}),
        ("beta must be above 0", {"beta": 0.0}),
        ("`lm_head` is not supported", {"peft_config": lambda: lora("q_proj", "lm_head")}),
        ("its head is a TrainableTokensWrapper", {"peft_config": lambda: lora("q_proj", trainable_token_indices=[1])}),
        (
            "virtual tokens",
            {
                "peft_config": lambda: pytest.importorskip("peft").PromptTuningConfig(
                    task_type="CAUSAL_LM", num_virtual_tokens=2
                )
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_exact_is_refused(tokenizer, tmp_path, message, options):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    reference = None if "peft_config" in options else model_of(tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer_of(StropDPOTrainer, tokenizer, tmp_path, model_of(tokenizer), reference, **options)


def test_an_adapter_that_trl_does_not_see_is_refused(tokenizer, tmp_path):
    model = model_of(tokenizer, tie_word_embeddings=False)
    pytest.importorskip("peft").inject_adapter_in_model(lora("lm_head"), model)
    with pytest.raises(ValueError, match="an adapter on it would be ignored"):
        trainer_of(StropDPOTrainer, tokenizer, tmp_path, model, model_of(tokenizer))


def test_a_head_that_does_more_than_its_config_says_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="our head and its logits differ"):
        trainer_of(StropDPOTrainer, tokenizer, tmp_path, Halved(model_of(tokenizer).config), model_of(tokenizer))


def test_tf32_in_either_of_pytorchs_settings_is_known():
    def check():
        for api in ("legacy", "new"):
            if api == "legacy":
                torch.backends.cuda.matmul.allow_tf32 = True
            else:
                torch.backends.cuda.matmul.fp32_precision = "tf32"  # from here on reading allow_tf32 raises
            assert ours._rounding(torch.device("cuda"), torch.float32) == 0.01, api
            assert ours._rounding(torch.device("cpu"), torch.float32) == 1e-4
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert ours._rounding(torch.device("cuda"), torch.float32) == 1e-4

    in_a_fork(check)


def trainer_like(*, fsdp=False, stage=None, vision=False, **parallel):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    parallel = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1} | parallel)
    accelerator = SimpleNamespace(state=state, parallelism_config=parallel)
    return SimpleNamespace(
        accelerator=accelerator,
        is_fsdp_enabled=fsdp,
        _is_vlm=vision,
        _is_vision_dataset=False,
        model=torch.nn.Identity(),
    )


def test_sharded_weights_and_images_are_refused():
    for refused in ({"fsdp": True}, {"stage": 3}, {"tp_size": 2}, {"cp_size": 2}, {"sp_size": 2}, {"vision": True}):
        with pytest.raises(ValueError, match="StropDPOTrainer"):
            ours._check_setup(trainer_like(**refused))
    ours._check_setup(trainer_like())
    ours._check_setup(trainer_like(stage=2))


def test_models_without_a_decoder_of_their_own_are_refused(tokenizer):
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="not a decoder with a head"):
        ours._check_model(t5)
    model = model_of(tokenizer)
    with pytest.raises(ValueError, match="not a decoder with a head"):
        ours._check_model(model.model)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="device_map"):
        ours._check_model(model)


def test_without_trl_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "strop.kernels.integrations.trl")
    with pytest.raises(ImportError, match=r"pip install 'strop\[trl\]'"):
        importlib.import_module("strop.kernels.integrations.trl")


RANKS = """
import json, sys
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from strop.kernels.integrations.trl import StropDPOTrainer

cls, folder, rows = getattr(sys.modules[__name__], sys.argv[1], None) or trl.DPOTrainer, sys.argv[2], sys.argv[3]
config = trl.DPOConfig(output_dir=folder + "/out", per_device_train_batch_size=2, max_steps=3, logging_steps=1,
                       save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
                       learning_rate=1e-3, gradient_checkpointing=False, eval_strategy="steps", eval_steps=3)
data = Dataset.from_list(json.loads(rows))
trainer = cls(AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder + "/moved"),
              args=config, train_dataset=data, eval_dataset=data,
              processing_class=AutoTokenizer.from_pretrained(folder))
trainer.train()
assert trainer.accelerator.num_processes == 2
if trainer.accelerator.is_main_process:
    json.dump(trainer.state.log_history, open(f"{folder}/{sys.argv[1]}.json", "w"))
    torch.save(trainer.model.state_dict(), f"{folder}/{sys.argv[1]}.pt")
"""


@pytest.mark.slow
def test_two_ranks_train_as_trls_two_ranks(tokenizer, tmp_path):
    model, script = model_of(tokenizer), tmp_path / "ranks.py"
    model.save_pretrained(tmp_path)
    moved(model).save_pretrained(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path)
    script.write_text(RANKS)
    rows = json.dumps(ROWS * 3)  # an odd number, so that the last batch is not full
    for name in ("DPOTrainer", "StropDPOTrainer"):
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        done = subprocess.run([*ranks, name, str(tmp_path), rows], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    theirs, strop = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("DPOTrainer", "StropDPOTrainer"))
    for expected, found in zip(theirs, strop, strict=True):
        same_numbers(expected, found)
    theirs, strop = (torch.load(tmp_path / f"{name}.pt") for name in ("DPOTrainer", "StropDPOTrainer"))
    same_tensors(theirs, strop, rtol=0, atol=2e-5)
