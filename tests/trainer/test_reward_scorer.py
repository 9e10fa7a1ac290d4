"""Any folder of a sequence classifier with one output scores completions as plain transformers does."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import character_tokenizer
from test_reward import reward_folder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    MistralConfig,
)

from strop.trainer.cli import load_recipe
from strop.trainer.config import Scorer
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.reward import ENDS_TURN
from strop.trainer.run.tables import read_table
from strop.trainer.scoring import reward_model
from strop.trainer.scoring.base import Compute, Item, open_scorer
from strop.trainer.scoring.reward_model import RewardModelScorer, common

CPU = torch.device("cpu")
ASKED = [[{"role": "user", "content": "say 3"}], [{"role": "system", "content": "be brief"},
                                                 {"role": "user", "content": "what is left of twelve less seven?"}]]
SAID = ["3", "four", "3, I think", "", "five is left", "3 <|im_end|> 4"]


def items():
    return [Item(messages, text, None, {}, where=f"row {i}") for i, messages in enumerate(ASKED) for text in SAID]


def plain(folder, whole):
    """Scores of transformers' own forward, a conversation at a time and padded."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talks = [[*i.messages, {"role": "assistant", "content": i.completion}] for i in items() if "<|" not in i.completion]
    rows = [tokenizer.apply_chat_template(messages, return_dict=False, tokenize=True) for messages in talks]
    if not whole:  # up to the end-of-turn token
        rows = [row[:len(row) - row[::-1].index(tokenizer.eos_token_id)] for row in rows]
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]


def scores(scorer):
    counts = []
    found = scorer.score(items(), counts.append)
    assert sum(counts) == len(found) and not any(s.error for s in found)
    return [s.value for s, i in zip(found, items(), strict=True) if "<|" not in i.completion]


def classifier(config, folder, pad):
    torch.manual_seed(1)
    tokenizer = character_tokenizer()
    config = config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_labels=1,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                    initializer_range=0.2)
    config.pad_token_id = pad
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("pad", [None, 0, 2, 97])  # none, unused, the end of turn, the new line behind it
def test_a_decoder_scores_as_in_plain_transformers(tmp_path, config, pad):
    folder = classifier(config, tmp_path / "rm", pad)
    scorer = RewardModelScorer(folder, CPU, torch.float32)
    assert scorer.packed
    assert scores(scorer) == pytest.approx(plain(folder, whole=True), abs=1e-5)
    scorer.packed = False
    reward_model.run_separately(scorer.model)
    assert scores(scorer) == pytest.approx(plain(folder, whole=True), abs=1e-5)


def test_our_own_models_are_read_at_the_end_of_turn(tiny_model, tmp_path):
    folder = reward_folder(tiny_model, tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {ENDS_TURN: "end_of_turn"}))
    found = scores(RewardModelScorer(folder, CPU, torch.float32))
    assert found == pytest.approx(plain(folder, whole=False), abs=1e-5)
    assert found != pytest.approx(plain(folder, whole=True), abs=1e-5)


def test_small_passes_give_the_same_scores(tmp_path, monkeypatch):
    folder = classifier(LlamaConfig, tmp_path / "rm", 0)
    scorer = RewardModelScorer(folder, CPU, torch.float32)
    whole = scores(scorer)
    for budget in (1, 40, 100):
        monkeypatch.setattr(reward_model, "BUDGET", budget)
        assert scores(scorer) == pytest.approx(whole, abs=1e-5)


def test_an_encoder_is_padded(tmp_path):
    folder, tokenizer = tmp_path / "rm", character_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_labels=1, pad_token_id=0, initializer_range=0.2)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    scorer = RewardModelScorer(folder, CPU, torch.float32)
    assert not scorer.packed
    texts = ["\n".join(m["content"] for m in i.messages) for i in items()]
    model.eval()
    with torch.no_grad():
        expected = [model(**tokenizer(text, i.completion, return_tensors="pt")).logits.item()
                    for text, i in zip(texts, items(), strict=True)]
    found = scorer.score(items(), lambda n: None)
    assert [s.value for s in found] == pytest.approx(expected, abs=1e-5)


def test_what_does_not_fit_has_an_error_and_no_value(tmp_path):
    scorer = RewardModelScorer(classifier(LlamaConfig, tmp_path / "rm", 0), CPU, torch.float32)
    long = Item(ASKED[0], "x" * 600, None, {}, where="prompt p, sample 3")
    good, bad = scorer.score([Item(ASKED[0], "x", None, {}), long], lambda n: None)
    assert good.error is None and bad.value is None
    assert bad.error.startswith("prompt p, sample 3: ") and "512 fit" in bad.error


def test_common_leaves_a_token_of_each():
    assert common([[1, 2, 3]]) == 2 and common([[1, 2], [1, 2]]) == 1 and common([[1, 2, 3], [1, 2]]) == 1
    assert common([[1], [2]]) == 0 and common([[1, 2, 3], [1, 5, 3]]) == 1


def test_a_recipe_scores_with_one_and_notes_its_content(tiny_model, tiny_recipe, tmp_path, capsys):
    folder = reward_folder(tiny_model, tmp_path / "rm")
    path = tmp_path / "with-rm.yaml"
    text = tiny_recipe.read_text().replace("verifier: regex\n      verifier_args: {pattern: \"[0-9]\"}", f"""scorers:
        - {{rule: regex, args: {{pattern: "[0-9]"}}}}
        - {{reward_model: {folder}, weight: 0.1}}""")
    assert "reward_model" in text
    path.write_text(text)
    threads = torch.get_num_threads()
    assert main([str(path), "rounds=1", "select.pair_margin=0.1", "score.correct_by=regex"]) == 0
    torch.set_num_threads(threads)
    run = tmp_path / "runs/tiny"
    rows = [r for r in read_table(run / "round-00/score/scores.parquet").to_pylist() if r["scorer"] == "rm"]
    assert len(rows) == 24 * 8 and len({r["value"] for r in rows}) > 20
    assert main([str(path), "rounds=1", "select.pair_margin=0.1", "score.correct_by=regex", "--plan"]) == 0
    assert "stale" not in capsys.readouterr().out.split("plan of")[1]
    settings = folder / "generation_config.json"
    settings.write_text("{}")
    assert main([str(path), "rounds=1", "select.pair_margin=0.1", "score.correct_by=regex", "--plan"]) == 0
    assert "round-00/score" in capsys.readouterr().out.split("plan of")[1]


@pytest.mark.parametrize("keys, words", [({"reward_model": "rm", "rule": "number"}, "exactly one of"),
                                         ({"reward_model": "rm", "seconds": 3}, "seconds is not read"),
                                         ({"reward_model": "rm", "args": {"a": 1}}, "args is not read")])
def test_keys_of_other_kinds_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        Scorer.model_validate(keys)


def test_a_folder_of_another_kind_is_refused_before_the_run(tiny_model, tiny_recipe, capsys):
    source = "data.sources.0.scorers"
    assert main([str(tiny_recipe), f"{source}=[{{reward_model: {tiny_model}}}]", "data.sources.0.verifier=null",
                 "data.sources.0.verifier_args={}", "--plan"]) == 1
    assert "ForSequenceClassification" in capsys.readouterr().err


def test_the_guides_recipes_can_be_planned(tiny_model, tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text()
    recipes = re.findall(r"```yaml\n(.*?)```", guide[guide.index("### Reward models"):guide.index("## 4. ")], re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("data", "models"):
        (tmp_path / name).mkdir()
    rows = "".join(json.dumps({"prompt": f"{i} + {i}?", "answer": str(2 * i), "chosen": "a", "rejected": "b"}) + "\n"
                   for i in range(9))
    for name in ("pairs.jsonl", "maths", "chats.jsonl"):
        (tmp_path / "data" / name).write_text(rows)
    reward_folder(tiny_model, tmp_path / "models/rm")
    for name in ("my-model", "judge-a"):
        (tmp_path / "models" / name).symlink_to(tiny_model)
    assert len(recipes) == 3
    for i, text in enumerate(recipes):
        (tmp_path / f"{i}.yaml").write_text(text)
        assert main([f"{i}.yaml", "--plan"]) == 0, capsys.readouterr().err


def test_try_scores_with_one(tiny_model, tmp_path, capsys):
    folder = reward_folder(tiny_model, tmp_path / "rm")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "say 3", "completion": "3"}) + "\n")
    assert main(["try", f"reward_model={folder}", str(tmp_path / "rows.jsonl")]) == 0
    assert "rm on 1 rows" in capsys.readouterr().out


def test_damage_is_told_with_its_place(tiny_model, tmp_path):
    folder = reward_folder(tiny_model, tmp_path / "rm")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="rm: transformers cannot load it"):
        open_scorer(Scorer(reward_model=str(folder)), folder, 1, Compute(CPU, torch.float32, {}))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no config\.json"):
        open_scorer(Scorer(reward_model=str(folder)), folder, 1, Compute(CPU, torch.float32, {}))
    assert load_recipe({"data": {"sources": [{"name": "x", "path": "x", "scorers": [{"reward_model": "a/rm"}]}]}})
