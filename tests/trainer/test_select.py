import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stagecalls import rules, select

from strop.trainer.config import Recipe
from strop.trainer.errors import UserError
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.stages.select import pick

sys.path.insert(0, str(Path(__file__).parent))
from chats import tokenizer_of, turns
from rounds import prompts_of, round_of
from training import stage_in


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer_of("chatml").save_pretrained(folder)
    return folder


def recipe_of(rounds=3, data=None, seed=0, filters=None, loss="sigmoid", **keys):
    data = {"sources": [{"name": "s", "path": "x", "verifier": "exact"}],
            "sft": [{"name": "x", "path": "x", "rounds": []}]} | (data or {})
    return Recipe.model_validate({"rounds": rounds, "seed": seed, "data": data, "filter": filters or {},
                                  "dpo": {"loss": loss}, "select": keys})


def run(tmp_path, model, *rounds, data=None, name="select", turned=False, seed=0, filters=None, loss="sigmoid", **keys):
    """(sft rows, pairs, drops, stage) of a select over rounds of {prompt: [(text, score[, finish])]}."""
    stage = stage_in(tmp_path / name, "round-00/select")
    ids = sorted({p for r in rounds for p in r})
    select(stage, recipe_of(data=data, seed=seed, filters=filters, loss=loss, **keys), round=max(0, len(rounds) - 1),
           prompts=prompts_of(tmp_path / f"{name}-prompts", ids) if rounds else None, model=model,
           history=[round_of(tmp_path / f"{name}-{i}", r, turned) for i, r in enumerate(rounds)])
    return *(read_table(stage.dir / f"{t}.parquet").to_pylist() for t in ("sft", "pairs", "drops")), stage


def text(tokens):
    return "".join(chr(t) for t in tokens if t != 2)


def chosen_and_rejected(pairs):
    return [(p["prompt_id"], text(p["chosen_tokens"]), text(p["rejected_tokens"])) for p in pairs]


def best(rows):
    return [(r["prompt_id"], text(r["completion_tokens"])) for r in rows]


def test_best_goes_to_sft_best_and_worst_to_pairs(tmp_path, model):
    sft, pairs, drops, stage = run(tmp_path, model, {"p": [("bad", 0), ("good", 1), ("fair", 0.6), ("worse", 0.1)]})
    assert best(sft) == [("p", "good")] and chosen_and_rejected(pairs) == [("p", "good", "bad")]
    row, pair = sft[0], pairs[0]
    assert row["loss_mask"] == [True] * 5 and row["completion_tokens"][-1] == 2 and text(row["prompt_tokens"]) == "p"
    assert (row["score"], row["sample_index"], row["origin"], row["weight"]) == (1, 1, "round-00", 1)
    assert (pair["chosen_score"], pair["rejected_score"]) == (1, 0)
    assert [(d["sample_index"], d["reason"]) for d in drops] == [(2, "low_score"), (3, "low_score")]
    assert stage.counts == {"prompts": 1, "solved_prompts": 1, "pass_rate": 0.25, "sft_rows": 1, "pairs": 1,
                            "dropped/low_score": 2}


def test_template_tokens_are_those_that_end_a_turn(tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer_of("chatml").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    _, pairs, _, _ = run(tmp_path, folder, {"p": [("good", 1), ("bad", 0), ("cut", 0, "length")]}, pairs_per_prompt=1)
    assert pairs[0]["chosen_template"] == [False] * 4 + [True] and pairs[0]["rejected_template"] == [False] * 3 + [True]
    assert pairs[0]["chosen_mask"] == [True] * 5  # a mask is its own: what is learned does not know what is template


def test_scores_are_joined_by_id_not_by_position(tmp_path, model):
    rounds = {f"p{i}": [("a", i % 2), ("b", 1 - i % 2), ("c", 0)] for i in range(5)}
    one, two = (run(tmp_path, model, rounds, name=f"s{t}", turned=bool(t)) for t in (0, 1))
    assert best(one[0]) == [(f"p{i}", "a" if i % 2 else "b") for i in range(5)]
    for table in ("sft", "pairs", "drops"):
        assert (tmp_path / f"s0/{table}.parquet").read_bytes() == (tmp_path / f"s1/{table}.parquet").read_bytes()
    assert one[:3] == two[:3]


@pytest.mark.parametrize("score", [0, 0.5, 1])
def test_all_tied_makes_no_pair(tmp_path, model, score):
    ready = tmp_path / "ready.jsonl"
    ready.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    sft, pairs, drops, _ = run(tmp_path, model, {"p": [("a", score), ("b", score), ("c", score)]}, pair_margin=0.0,
                               data={"sft": [{"name": "r", "path": str(ready)}]})
    assert not pairs and "tie" in {d["reason"] for d in drops}
    assert len(sft) == (2 if score == 1 else 1)
    assert ("unsolved" in {d["reason"] for d in drops}) == (score < 1)


def test_margin(tmp_path, model):
    rounds = {"p": [("a", 1), ("b", 0.6)], "q": [("a", 1), ("b", 0.5)]}
    _, pairs, drops, _ = run(tmp_path, model, rounds, pair_margin=0.5)
    assert chosen_and_rejected(pairs) == [("q", "a", "b")]
    assert ("p", "margin") in {(d["prompt_id"], d["reason"]) for d in drops}


def test_cut_completions(tmp_path, model):
    rounds = {"p": [("cut", 1, "length"), ("fine", 1), ("bad", 0, "length"), ("poor", 0.2)],
              "q": [("cut", 1, "length"), ("poor", 0)], "r": [("cut", 1, "length"), ("lost", 0, "length")],
              "s": [("fine", 1), ("lost", 0, "length")]}
    sft, pairs, _, stage = run(tmp_path, model, rounds)
    assert best(sft) == [("p", "fine"), ("s", "fine")]
    # a rejected that stopped is preferred, a cut one taken where there is no other; chosen always stopped
    assert chosen_and_rejected(pairs) == [("p", "fine", "poor"), ("s", "fine", "lost")]
    assert stage.counts["dropped/cut"] == 6 and stage.counts["solved_prompts"] == 2
    sft, _, _, _ = run(tmp_path, model, rounds, name="with", sft_cut=True)
    assert best(sft) == [("p", "cut"), ("q", "cut"), ("r", "cut"), ("s", "fine")]


def test_pass_rate_window(tmp_path, model):
    rounds = {"all": [("a", 1), ("b", 1)], "half": [("a", 1), ("b", 0)], "none": [("a", 0), ("b", 0)]}
    sft, pairs, drops, _ = run(tmp_path, model, rounds, pass_rate_min=0.1, pass_rate_max=0.9)
    assert {r["prompt_id"] for r in sft} == {"half"} == {p["prompt_id"] for p in pairs}
    assert Counter((d["prompt_id"], d["reason"]) for d in drops) == {("all", "pass_rate"): 2, ("none", "pass_rate"): 2}


@pytest.mark.parametrize("accumulate", [True, False])
def test_the_window_looks_at_all_rounds_of_a_prompt(tmp_path, model, accumulate):
    """Of p 3 in 4 are right, of q 2 in 2 and then 0 in 2, of r 1 in 2: whether a prompt is too easy is told by all of
    its samples, also where only the newest are trained on."""
    first = {"p": [("a", 1), ("b", 0)], "q": [("a", 1), ("b", 1)], "r": [("a", 1), ("b", 0)]}
    second = {"p": [("c", 1), ("d", 1)], "q": [("c", 0), ("d", 0, "length")], "t": [("e", 1), ("f", 0)]}
    sft, _, drops, stage = run(tmp_path, model, first, second, pass_rate_max=0.7, accumulate=accumulate)
    assert best(sft) == [*[("q", "a"), ("r", "a")] * accumulate, ("t", "e")]
    gone = [d["detail"] for d in drops if d["reason"] == "pass_rate"]
    assert len(gone) == (4 if accumulate else 2) and all("0.750 over all rounds" in g for g in gone)
    table = {r["prompt_id"]: r for r in read_table(stage.dir / "difficulty.parquet").to_pylist()}
    assert table["p"] == {"prompt_id": "p", "source": "s", "rounds": [0, 1], "samples": [2, 2], "correct": [1, 2],
                          "pass_rate": 0.75}
    assert (table["q"]["correct"], table["q"]["pass_rate"], table["r"]["rounds"]) == ([2, 0], 0.5, [0])


def test_repetitive_and_overlong_samples_are_no_examples(tmp_path, model):
    loop = "and so on " * 8
    rounds = {"p": [(loop, 1), ("good", 1), ("bad", 0)], "q": [(loop, 1), ("bad", 0)], "r": [("good", 1), (loop, 0)]}
    sft, pairs, drops, stage = run(tmp_path, model, rounds, sft_per_prompt=2, filters={"max_repetition": 0.6})
    assert best(sft) == [("p", "good"), ("r", "good")]
    # what is rejected may be a loop: that is what is to be unlearned
    assert chosen_and_rejected(pairs) == [("p", "good", "bad"), ("r", "good", loop)]
    assert ("q", "repetitive") in {(d["prompt_id"], d["reason"]) for d in drops if d["sample_index"] is None}
    assert stage.counts["dropped/repetitive"] == 3
    sft, _, _, stage = run(tmp_path, model, rounds, name="short", sft_per_prompt=2, filters={"max_tokens": 5})
    assert best(sft) == [("p", "good"), ("r", "good")] and stage.counts["dropped/too_long"] == 3
    sft, pairs, _, stage = run(tmp_path, model, rounds, name="long", filters={"min_tokens": 6, "max_repetition": 1})
    assert best(sft) == [("p", loop), ("q", loop)] and stage.counts["dropped/too_short"] == 3
    assert chosen_and_rejected(pairs) == [("p", loop, "bad"), ("q", loop, "bad")]


def test_exact_duplicates(tmp_path, model):
    rounds = {"p": [("good", 1), ("good", 1), ("bad", 0), ("bad", 0), ("good", 1, "length")]}
    sft, pairs, drops, _ = run(tmp_path, model, rounds, sft_per_prompt=4, pairs_per_prompt=4)
    assert best(sft) == [("p", "good")] and chosen_and_rejected(pairs) == [("p", "good", "bad")]
    assert Counter(d["reason"] for d in drops) == {"duplicate": 2, "cut": 1}


def test_empty_completions(tmp_path, model):
    sft, pairs, drops, _ = run(tmp_path, model, {"p": [("", 1), (" ", 1), ("good", 1), ("bad", 0)]})
    assert best(sft) == [("p", "good")] and chosen_and_rejected(pairs) == [("p", "good", "bad")]
    assert [d["reason"] for d in drops] == ["empty", "empty"]


def test_tie_break(tmp_path, model):
    rounds = {"p": [("lengthy", 1), ("ok", 1), ("longest of all", 1), ("no no no", 0), ("no", 0)]}
    for rule, wanted in (("shortest", ("ok", "no")), ("first", ("lengthy", "no no no"))):
        sft, pairs, _, _ = run(tmp_path, model, rounds, name=rule, tie_break=rule)
        assert best(sft) == [("p", wanted[0])] and chosen_and_rejected(pairs) == [("p", *wanted)]
    drawn = [run(tmp_path, model, rounds, name=f"r{s}", tie_break="random", seed=s % 8)[:2] for s in range(9)]
    assert drawn[0] == drawn[8] and len({best(sft)[0] for sft, _ in drawn}) > 1


def test_several_a_prompt(tmp_path, model):
    rounds = {"p": [("a", 1), ("bb", 1), ("ccc", 1), ("d", 0), ("ee", 0)]}
    sft, pairs, drops, _ = run(tmp_path, model, rounds, sft_per_prompt=2, pairs_per_prompt=5)
    assert best(sft) == [("p", "a"), ("p", "bb")]
    assert chosen_and_rejected(pairs) == [("p", "a", "d"), ("p", "bb", "ee")]
    assert [(d["sample_index"], d["reason"]) for d in drops] == [(2, "not_best")]


def test_accumulate_keeps_the_best_so_far_with_its_origin(tmp_path, model):
    first = {"p": [("early", 1), ("bad", 0)], "q": [("fair", 0.5), ("bad", 0)], "only": [("x", 1), ("y", 0)]}
    second = {"p": [("late", 0), ("bad", 0)], "q": [("good", 1), ("bad", 0)]}
    sft, pairs, _, stage = run(tmp_path, model, first, second)
    assert {(r["prompt_id"], text(r["completion_tokens"]), r["origin"]) for r in sft} == {
        ("p", "early", "round-00"), ("q", "good", "round-01"), ("only", "x", "round-00")}
    assert {(*c, p["origin"]) for c, p in zip(chosen_and_rejected(pairs), pairs, strict=True)} == {
        ("p", "early", "bad", "round-00"), ("q", "fair", "bad", "round-00"), ("q", "good", "bad", "round-01"),
        ("only", "x", "y", "round-00")}
    assert (stage.counts["prompts"], stage.counts["solved_prompts"], stage.counts["pass_rate"]) == (2, 1, 0.25)
    sft, pairs, _, _ = run(tmp_path, model, first, second, name="newest", accumulate=False)
    assert best(sft) == [("q", "good")] and chosen_and_rejected(pairs) == [("q", "good", "bad")]


def test_a_pair_that_comes_again_stands_once(tmp_path, model):
    rounds = {"p": [("good", 1), ("bad", 0)]}
    sft, pairs, drops, _ = run(tmp_path, model, rounds, rounds)
    assert len(sft) == 1 and [p["origin"] for p in pairs] == ["round-00"]
    assert "duplicate" in {d["reason"] for d in drops}


def test_held_out_prompts_are_refused(tmp_path, model):
    stage = stage_in(tmp_path / "s", "select")
    with pytest.raises(UserError, match="prompt p is not among the training prompts"):
        select(stage, recipe_of(), round=0, prompts=prompts_of(tmp_path / "p", ["p"], split="test"), model=model,
               history=[round_of(tmp_path / "r", {"p": [("a", 1)]})])


def test_nothing_left(tmp_path, model):
    with pytest.raises(UserError, match=r"nothing survives selection \(dropped: .*unsolved 1.*sample\.k"):
        run(tmp_path, model, {"p": [("a", 0), ("b", 0)]})
    assert read_table(tmp_path / "select" / "drops.parquet").num_rows == 4


def test_ready_data_joins_its_rounds(tmp_path, model):
    sft_path, pair_path = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    sft_path.write_text("\n".join(json.dumps({"messages": turns("2+2", a)}) for a in "45") + "\n{\n")
    pair_path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    data = {"max_bad_rows": 1, "sft": [{"name": "mine", "path": str(sft_path), "weight": 0.5, "rounds": [0]}],
            "preferences": [{"name": "prefs", "path": str(pair_path), "weight": 2.0}]}
    sft, pairs, drops, stage = run(tmp_path, model, {"p": [("good", 1), ("bad", 0)]}, data=data)
    assert [(r["row_id"], r["weight"]) for r in sft] == [("round-00/p/0", 1), ("mine/1", 0.5), ("mine/2", 0.5)]
    assert [(p["source"], p["origin"], p["weight"]) for p in pairs] == [("s", "round-00", 1), ("prefs", "prefs", 2)]
    assert [d["reason"] for d in drops] == ["malformed"] and stage.counts["sft_rows"] == 3
    again = {"p": [("good", 1), ("bad", 0)]}
    sft, pairs, _, _ = run(tmp_path, model, again, again, data=data, name="later")
    assert {r["origin"] for r in sft} == {"round-00"} and {p["origin"] for p in pairs} == {"round-00", "prefs"}


def test_ready_data_alone(tmp_path, model):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"messages": turns("2+2", "4")}))
    sft, pairs, _, _ = run(tmp_path, model, data={"sft": [{"name": "mine", "path": str(path)}]})
    assert len(sft) == 1 and not pairs


SAMPLE = st.tuples(st.sampled_from(["a", "bb", "ccc", "", "dd"]), st.sampled_from([0.0, 0.4, 1.0]),
                   st.sampled_from(["stop", "length"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(SAMPLE, min_size=1, max_size=8), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3),
       st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["shortest", "first", "random"]),
       st.sampled_from(["sigmoid", "kto", "listwise"]))
def test_every_sample_is_used_or_dropped_and_pairs_are_sound(rounds, per_prompt, pair_count, cut, margin, tie, loss):
    of_pairs = {"pairs_per_prompt": pair_count, "pair_margin": margin} if loss == "sigmoid" else {}
    recipe = recipe_of(sft_per_prompt=per_prompt, sft_cut=cut, tie_break=tie, loss=loss, **of_pairs)
    samples = [{"prompt_id": "p", "sample_index": i, "round": r, "completion": t, "score": s, "finish": f,
                "completion_tokens": [*map(ord, t), *[2] * (f == "stop")], "correct": s == 1 and f == "stop"}
               for r, drawn in enumerate(rounds) for i, (t, s, f) in enumerate(drawn)]
    drops = Drops(None)
    drops.add = lambda reason, **row: drops.rows.append({"reason": reason} | row)
    found, pairs, rated = pick("p", "s", samples, 0.5, rules(recipe), drops)
    used = [(s["round"], s["sample_index"]) for s in [*found, *rated, *(s for pair in pairs for s in pair)]]
    dropped = [(int(d["detail"][6:8]), d["sample_index"]) for d in drops.rows if d.get("sample_index") is not None]
    assert set(used) | set(dropped) == {(s["round"], s["sample_index"]) for s in samples}
    assert not set(used) & set(dropped) and len(set(dropped)) == len(dropped)
    assert len({tuple(s["completion_tokens"]) for s in found}) == len(found) <= per_prompt
    assert not (pairs if rated or loss != "sigmoid" else rated)
    lists = {r: [s for s in rated if s["round"] == r] for r in range(len(rounds))}
    for mine in lists.values() if loss == "listwise" else [rated]:
        assert len({tuple(s["completion_tokens"]) for s in mine}) == len(mine)
        assert all(s["completion"].strip() for s in mine)
        if loss == "listwise" and mine:
            assert [s["score"] for s in mine] == sorted((s["score"] for s in mine), reverse=True)
            assert mine[0]["score"] > mine[-1]["score"]
    if loss == "kto":
        assert {tuple(s["completion_tokens"]) for s in rated} == {
            tuple(s["completion_tokens"]) for s in samples if s["completion"]}
    for chosen, rejected in pairs:
        assert chosen["score"] - rejected["score"] >= margin and chosen["score"] > rejected["score"]
        assert chosen["finish"] == "stop" and chosen["round"] == rejected["round"]
        assert chosen["completion_tokens"] != rejected["completion_tokens"]


# ---- losses that need no pairs

def test_completions_are_labeled_by_what_is_correct_and_listed_by_score(tmp_path, model):
    rounds = ({"p": [("good", 1), ("bad", 0), ("fair", 0.6), ("bad", 0), ("", 0)], "q": [("a", 1), ("b", 1)],
               "r": [("never ending", 1, "length")]}, {"p": [("good", 1), ("new", 0.2)]})
    _, pairs, drops, stage = run(tmp_path, model, *rounds, loss="kto")
    rows = read_table(stage.dir / "rated.parquet").to_pylist()
    assert not pairs and stage.counts["rated"] == len(rows) == 7 and "pairs" not in stage.counts
    assert {(r["origin"], r["prompt_id"], text(r["completion_tokens"]), r["desirable"]) for r in rows} == {
        ("round-00", "p", "good", True), ("round-00", "p", "bad", False), ("round-00", "p", "fair", False),
        ("round-01", "p", "new", False), ("round-00", "q", "a", True), ("round-00", "q", "b", True),
        ("round-00", "r", "never ending", False)}
    good = next(r for r in rows if r["row_id"] == "round-00/p/0")
    assert len(good["template"]) == 5 and all(good["loss_mask"]) and (good["score"], good["sample_index"]) == (1, 0)
    gone = {(d["prompt_id"], d["sample_index"], d["reason"]) for d in drops}
    assert gone >= {("p", 3, "duplicate"), ("p", 4, "empty")}
    _, pairs, drops, stage = run(tmp_path, model, *rounds, loss="listwise", name="lists")
    rows = read_table(stage.dir / "rated.parquet").to_pylist()
    assert [(r["list_id"], text(r["completion_tokens"]), r["score"]) for r in rows] == [
        ("round-00/p", "good", 1), ("round-00/p", "fair", 0.6), ("round-00/p", "bad", 0), ("round-01/p", "good", 1),
        ("round-01/p", "new", 0.2)] and not pairs
    assert {d["prompt_id"] for d in drops if d["reason"] == "tie"} == {"q", "r"}


def test_a_correct_completion_that_fails_the_filters_is_not_desired(tmp_path, model):
    _, _, drops, stage = run(tmp_path, model, {"p": [("good", 1), ("longer", 1), ("worse!", 0)]}, loss="bco",
                             filters={"max_tokens": 5})
    rows = read_table(stage.dir / "rated.parquet").to_pylist()
    assert [text(r["completion_tokens"]) for r in rows] == ["good", "worse!"]
    assert [(d["sample_index"], d["reason"]) for d in drops] == [(1, "too_long")]


def test_ready_data_of_every_kind_goes_where_the_loss_reads_it(tmp_path, model):
    rows = {"pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}, "labels": {
        "prompt": "d", "completion": "e", "label": False}, "lists": {
        "prompt": "f", "completions": ["g", "h", "i"], "ranks": [3, 1, 2]}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    for loss, kinds in (("kto", ("pairs", "labels")), ("listwise", ("pairs", "lists"))):
        data = {"preferences": [{"name": n, "path": str(tmp_path / f"{n}.jsonl"), "weight": 2.0} for n in kinds]}
        _, pairs, _, stage = run(tmp_path, model, data=data, loss=loss, name=loss)
        found = read_table(stage.dir / "rated.parquet").to_pylist()
        assert not pairs and {r["weight"] for r in found} == {2.0}
        read = tokenizer_of("chatml").decode
        assert [(r["row_id"], read(r["completion_tokens"])[0], r["desirable"] if loss == "kto" else r["score"])
                for r in found] == ([("pairs/1/0", "b", True), ("pairs/1/1", "c", False), ("labels/1/0", "e", False)]
                                    if loss == "kto" else
                                    [("pairs/1/0", "b", 1), ("pairs/1/1", "c", 0), ("lists/1/0", "h", -1),
                                     ("lists/1/1", "i", -2), ("lists/1/2", "g", -3)])


# ---- scores of several scorers, in units of their own

SUM = [{"rule": "exact"}, {"rule": "number", "name": "reward"}]


def test_margins_are_in_the_units_of_the_score(tmp_path, model):
    """A reward model's values are not bound to [0, 1], and their spread differs between prompts."""
    rounds = {"p": [("a", -7.0), ("b", -7.4), ("c", -9.0)], "q": [("a", 30.0), ("b", 30.4), ("c", 30.2)]}
    sft, pairs, _, _ = run(tmp_path, model, rounds, pair_margin=1.5, sft_min_score=None)
    assert chosen_and_rejected(pairs) == [("p", "a", "c")] and best(sft) == [("p", "a"), ("q", "b")]
    _, pairs, drops, _ = run(tmp_path, model, rounds, pair_margin=2.0, pair_margin_unit="z", name="z")
    assert chosen_and_rejected(pairs) == [("p", "a", "c"), ("q", "b", "a")]
    _, pairs, drops, _ = run(tmp_path, model, rounds, pair_margin=2.4, pair_margin_unit="z", name="zz")
    assert chosen_and_rejected(pairs) == [("q", "b", "a")] and ("p", "margin") in {
        (d["prompt_id"], d["reason"]) for d in drops}


def test_the_scorer_that_decides_a_pair_is_named_and_counted(tmp_path, model):
    data = {"sources": [{"name": "s", "path": "x", "scorers": SUM}]}
    rounds = {"p": [("a", {"exact": 1, "reward": 0.2}), ("b", {"exact": 0, "reward": 0.1})],
              "q": [("a", {"exact": 1, "reward": -5.0}), ("b", {"exact": 0, "reward": 3.0})]}
    _, pairs, _, stage = run(tmp_path, model, rounds, data=data, sft_min_score=None)
    assert [(p["prompt_id"], text(p["chosen_tokens"]), p["decided_by"]) for p in pairs] == [
        ("p", "a", "exact"), ("q", "b", "reward")]
    assert (stage.counts["decided/exact"], stage.counts["decided/reward"]) == (1, 1)
    assert {(r["prompt_id"], r["sample_index"]): (r["score"], r["correct"])
            for r in read_table(stage.dir / "judged.parquet").to_pylist()} == {
        ("p", 0): (1.2, True), ("p", 1): (0.1, False), ("q", 0): (-4.0, False), ("q", 1): (3.0, True)}
    _, pairs, _, _ = run(tmp_path, model, rounds, data=data, name="by", by="exact")
    assert [(p["prompt_id"], text(p["chosen_tokens"]), p["decided_by"]) for p in pairs] == [
        ("p", "a", "exact"), ("q", "a", "exact")]


def test_a_completion_without_a_score_is_not_learned_from(tmp_path, model):
    rounds = {"p": [("a", None), ("b", 1), ("c", 0)], "q": [("a", None)]}
    sft, pairs, drops, _ = run(tmp_path, model, rounds)
    assert best(sft) == [("p", "b")] and chosen_and_rejected(pairs) == [("p", "b", "c")]
    assert [(d["prompt_id"], d["sample_index"], d["detail"]) for d in drops if d["reason"] == "unscored"] == [
        ("p", 0, "round-00: it failed"), ("q", 0, "round-00: it failed")]
