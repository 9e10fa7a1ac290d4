"""Pairs: the tokens of the loss and of its NLL, and how far the pairs are from the policy."""

import pyarrow as pa
import pytest
import torch
from stagecalls import dpo, reference, sft
from training import Log, recipe_of, select_of, stage_in

from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.training.batch import collate
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.pairs import load_pairs

CPU = torch.device("cpu")


def change(select, function) -> None:
    """Applies function(row) -> changes to every row of pairs.parquet."""
    rows = read_table(select / "pairs.parquet").to_pylist()
    write_table(select / "pairs.parquet", pa.Table.from_pylist([row | function(row) for row in rows]))


def run(tmp_path, name, model, log=None, **keys):
    recipe = recipe_of(dpo={"batch_size": 12, "lr": 1e-3} | keys)
    table, stage = stage_in(tmp_path / f"{name}-reference", "reference"), stage_in(tmp_path / name, "dpo", log)
    reference(table, recipe, select=tmp_path / "select", model=model)
    dpo(stage, recipe, select=tmp_path / "select", policy=model, reference=table.dir, same_weights=True,
        policy_hash="mine")
    return stage


def test_the_nll_keeps_what_the_loss_leaves_out(tmp_path):
    path = select_of(tmp_path / "select") / "pairs.parquet"
    masked, whole = (load_pairs(stage_in(tmp_path / "s", "dpo"), path, recipe_of(dpo={"mask_template_tokens": m}).dpo,
                                512, record=False) for m in (True, False))
    for m, w in zip(masked, whole, strict=True):
        assert m.nll_targets() == w.nll_targets() == w.targets() == [len(c) for c in m.group.completions]
        assert m.targets() == [len(c) - (len(c) > 1) for c in m.group.completions]
        assert m.predicted() == w.predicted() and m.fingerprint() != w.fingerprint()


def test_the_nll_is_the_loss_of_sft_on_the_chosen_completions(tmp_path, tiny_model):
    """End of turn included, whatever the preference loss masks."""
    select, logs = select_of(tmp_path / "select"), {}
    for masked in (True, False):
        logs[masked] = Log()
        run(tmp_path, f"dpo-{masked}", tiny_model, logs[masked], mask_template_tokens=masked, nll_weight=0.2)
    chosen = [{"row_id": r["row_id"], "source": "s", "prompt_id": r["prompt_id"], "sample_index": 0, "score": 1.0,
               "weight": 1.0, "prompt_tokens": r["prompt_tokens"], "completion_tokens": r["chosen_tokens"],
               "loss_mask": r["chosen_mask"], "origin": "round-00"}
              for r in read_table(select / "pairs.parquet").to_pylist()]
    write_table(select / "sft.parquet", pa.Table.from_pylist(chosen))
    log = Log()
    sft(stage_in(tmp_path / "sft", "sft", log), recipe_of(sft={"batch_size": 12}), select=select, start=tiny_model)
    for masked in (True, False):
        assert logs[masked].rows[0]["nll_loss"] == pytest.approx(log.rows[0]["loss"], abs=1e-6)
    a, b = (logs[masked].rows[0]["logps/chosen"] for masked in (True, False))
    assert a > b + 0.5  # the preference loss does leave them out


def test_dpo_with_nll_teaches_to_stop(tmp_path, tiny_model):
    """The log-prob of the end of chosen completions rises, although the preference loss never sees it."""
    select = select_of(tmp_path / "select")
    change(select, lambda row: {f"{side}_tokens": [*row[f"{side}_tokens"][:-1], 2] for side in ("chosen", "rejected")})
    pairs = load_pairs(stage_in(tmp_path / "s", "dpo"), select / "pairs.parquet",
                       recipe_of(dpo={"mask_template_tokens": False}).dpo, 512, record=False)

    def ends(folder):
        groups = collate(pairs, list(range(len(pairs))), CPU)
        logp = Scorer(ModelFolder(folder).load(torch.float32, CPU))(groups)
        return torch.stack([logp[end - 1] for _, end in groups.target_bounds[::2]]).mean().item()

    stage = run(tmp_path, "dpo", tiny_model, mask_template_tokens=True, nll_weight=1.0, epochs=10, lr=1e-2)
    assert ends(stage.dir / "model") > ends(tiny_model) + 1.0


def test_distance_from_the_policy_is_counted(tmp_path, tiny_model):
    select = select_of(tmp_path / "select", 12)
    log_probs = {}
    table = stage_in(tmp_path / "reference", "reference")
    reference(table, recipe_of(dpo={"batch_size": 12}), select=select, model=tiny_model)
    for row in read_table(table.dir / "reference.parquet").to_pylist():
        log_probs[row["row_id"]] = row

    def by_writer(row):
        """Two of three pairs by the policy itself; the others by weights that find each token 0.1 nats likelier, or of
        unknown origin."""
        i, found = int(row["row_id"][1:]), log_probs[row["row_id"]]
        writer = ["mine", "mine", "another"][i % 3]
        sides = {}
        for side in ("chosen", "rejected"):
            own = found["logps"][side == "rejected"]
            logp = sum(own) + (0.1 * len(own) if writer == "another" else 0.0)
            sides |= {f"{side}_writer_hash": writer, f"{side}_logp": logp}
        return sides

    change(select, by_writer)
    counts = run(tmp_path, "dpo", tiny_model).counts
    assert counts["off_policy_share"] == pytest.approx(1 / 3)
    tokens = {r: sum(map(len, x["logps"])) for r, x in log_probs.items()}
    far = sum(n for r, n in tokens.items() if int(r[1:]) % 3 == 2)
    assert counts["writer_log_ratio"] == pytest.approx(0.1 * far / sum(tokens.values()), abs=1e-5)
    change(select, lambda row: {"chosen_logp": None, "rejected_logp": None, "chosen_writer_hash": None})
    counts = run(tmp_path, "ready", tiny_model).counts  # ready data: nobody knows who wrote it
    assert counts["off_policy_share"] == 1.0 and "writer_log_ratio" not in counts


@pytest.mark.parametrize("sample", [
    {"models": [{"name": "me", "weights": "current"}, {"name": "first", "weights": "start"}]},
    {"engine": "openai", "model": "teacher", "base_url": "http://127.0.0.1:1/v1"}], ids=["writers", "a server's model"])
def test_pairs_of_the_policy_need_samples_of_it(sample):
    assert recipe_of(sample=sample, dpo={"pairs": "round"})
    assert recipe_of(sample=sample, dpo={"pairs": "policy", "enabled": False})
    with pytest.raises(ValueError, match=r"sample names other writers; set dpo\.pairs=round"):
        recipe_of(sample=sample, dpo={"pairs": "policy"})
    recipe_of(sample={}, dpo={"pairs": "policy"})
