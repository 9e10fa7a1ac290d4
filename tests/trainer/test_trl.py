"""The same model, reference and pairs in TRL's DPOTrainer and here give the same loss, metrics and gradients."""

import pytest
import torch

from strop.kernels import Group, preference_loss, preference_means
from strop.trainer.models.loading import ModelFolder
from strop.trainer.training.batch import Example, collate
from strop.trainer.training.logprobs import Scorer

CPU = torch.device("cpu")
ROWS = [{"prompt": "say 3 or 4: ", "chosen": "3", "rejected": "four, I think"},
        {"prompt": "what is left of twelve, less seven?", "chosen": "five is left", "rejected": "6"},
        {"prompt": "no", "chosen": "yes", "rejected": "yes and no"},
        {"prompt": "spell cat", "chosen": "c-a-t", "rejected": "k-a-t!"}]


def moved(model_dir):
    """Reference weights: the same model a little off."""
    model = ModelFolder(model_dir).load(torch.float32, CPU, "eager")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.01)
    return model


@pytest.mark.parametrize("options", [
    {"beta": 0.1}, {"beta": 0.5}, {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}], ids=str)
def test_dpo_trainer_computes_the_same_loss_metrics_and_gradients(tiny_model, tmp_path, options):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = ModelFolder(tiny_model).load(torch.float32, CPU, "eager"), moved(tiny_model)
    config = DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
                       gradient_checkpointing=False, disable_dropout=True, **options)
    trainer = DPOTrainer(policy, ref_model=reference, args=config, train_dataset=Dataset.from_list(ROWS),
                         processing_class=ModelFolder(tiny_model).tokenizer())
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    logged = {k: v[-1] for k, v in trainer._metrics["train"].items() if isinstance(v, list)}
    gradients = {n: p.grad for n, p in policy.named_parameters()}

    ours = ModelFolder(tiny_model).load(torch.float32, CPU)
    ref_dir = tmp_path / "reference"
    reference.save_pretrained(ref_dir)
    pairs = [Example(str(i), Group(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]])) for i, r in enumerate(rows)]
    groups = collate(pairs, list(range(4)), CPU)
    with torch.no_grad():
        ref = Scorer(ModelFolder(ref_dir).load(torch.float32, CPU))(groups)
    loss, metrics = preference_loss(
        Scorer(ours)(groups), ref, segments=groups.target_segment, num_segments=8, beta=options["beta"],
        nll_weight=0.2 if "loss_type" in options else 0.0)
    loss.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
    means = preference_means(metrics)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                 "logps/rejected"):
        assert means[name] == pytest.approx(logged[name], rel=1e-5, abs=1e-5), name
    assert abs(means["rewards/margins"]) > 1e-3  # the comparison is not one of zeros
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")
