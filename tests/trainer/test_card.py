import re

import pytest
import yaml

from strop.trainer.reports.card import GGUF_NOTE, model_card
from strop.trainer.reports.statistics import wilson

INFO = {
    "name": "my_run", "base_model": "SmolLM2-135M-Instruct", "license": "apache-2.0", "base_from_gguf": True,
    "recipe": {"rounds": 1, "sft": {"lr": 1e-5, "betas": (0.9, 0.95)}}, "hashes": {"model": "ab" * 16},
    "versions": {"torch": "2.13.0"},
    "rounds": [{"round": "round-00", "promoted": "dpo", "stages": {
        "sft": {"hash": "c" * 32, "counts": {"rows": 1200, "share": 0.51234}, "seconds": 61.4},
        "dpo": {"hash": "d" * 32, "counts": {}, "seconds": 30}}}],
    "sources": [{"name": "sums|<b>", "origin": "chain_sum", "verifier": "number", "prompts": 2000}],
    "results": [{"candidate": "base", "split": "test", "source": None, "n": 200, "pass_rate": 0.12}],
    "gains": [{"candidate": "dpo", "over": "base", "split": "test", "gain": 0.153, "low": 0.101, "high": 0.2}],
}


def split(card):
    front, body = re.fullmatch(r"---\n(.*?)---\n(.*)", card, re.S).groups()
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_reads():
    front, _ = split(model_card(INFO))
    assert front["license"] == "apache-2.0" and front["base_model"] == "SmolLM2-135M-Instruct"
    assert front["library_name"] == "transformers" and "dpo" in front["tags"]
    assert "license" not in split(model_card(INFO | {"license": None}))[0]


def test_front_matter_survives_odd_names():
    assert split(model_card({"name": "x", "base_model": "a: b\n---\n# c"}))[0]["base_model"] == "a: b --- # c"


def test_results_have_intervals_and_the_reservation():
    body = split(model_card(INFO))[1]
    assert "| base | test | all | 200 | 12.0 % | 8.2 % to 17.2 % |" in body
    assert "| dpo | base | test | +15.3 | +10.1 to +20.0 |" in body
    assert GGUF_NOTE in body
    assert GGUF_NOTE not in model_card(INFO | {"base_from_gguf": False})


def test_lineage_data_and_recipe_are_there_and_escaped():
    body = split(model_card(INFO))[1]
    assert "# my\\_run" in body
    assert "| round-00 | sft | cccccccccccc | rows 1,200, share 0.5123 | 61 |  |" in body
    assert "| round-00 | dpo | dddddddddddd |  | 30 | yes |" in body
    assert "| sums\\|&lt;b&gt; | chain\\_sum | number | 2,000 |" in body
    assert f"| model | `{'ab' * 16}` |" in body
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.S).group(1))
    assert recipe["sft"] == {"lr": 1e-5, "betas": [0.9, 0.95]}


def test_the_least_it_needs():
    card = model_card({"name": "x", "base_model": "y"})
    assert "## Results" not in card and "## Lineage" not in card and "## Use" in card


@pytest.mark.parametrize(("rate", "n", "low", "high"), [(0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0),
                                                        (0.5, 100, 0.4038, 0.5962), (0.0, 0, 0.0, 1.0)])
def test_wilson_against_printed_values(rate, n, low, high):
    assert wilson(rate, n) == pytest.approx((low, high), abs=1e-4)
