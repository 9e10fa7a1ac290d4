"""The filters against planted defects: what they find, and what they leave alone."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stagecalls import prompts, sources_of

from strop.trainer.config import Filter, ReadyData, Recipe
from strop.trainer.data.contamination import HeldOut, held_out_of
from strop.trainer.data.dedup import near_duplicates
from strop.trainer.data.quality import repetition, truncation
from strop.trainer.data.ready import ready_pairs, ready_sft
from strop.trainer.data.rows import Quarantine
from strop.trainer.data.text import words
from strop.trainer.errors import UserError
from strop.trainer.run.tables import Drops, read_table

sys.path.insert(0, str(Path(__file__).parent))
from chats import tokenizer_of, turns
from training import stage_in

CONSONANTS, VOWELS = "bcdfghklmnprstvw", "aeiou"


def vocabulary(draw, n=4000):
    return ["".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(draw.randint(1, 4))) for _ in range(n)]


def texts_of(n, seed=0, low=12, high=40):
    """n unrelated texts, and what draws more of their words."""
    draw = random.Random(seed)
    known = vocabulary(draw)
    return [" ".join(draw.choice(known) for _ in range(draw.randint(low, high))) for _ in range(n)], draw, known


def changed(text, draw, known):
    """A copy that a person would call the same: a word replaced, another case, marks, or a polite word in front."""
    own = text.split()
    kind = draw.randrange(4)
    if kind == 0:
        own[draw.randrange(len(own))] = draw.choice(known)
    elif kind == 1:
        own = [word.capitalize() for word in own]
    elif kind == 2:
        own = [word + draw.choice(["", ",", "!"]) for word in own[:3]] + own[3:]
    else:
        own = ["Please,", *own]
    return " ".join(own) + ("?" if kind == 1 else "")


def run(tmp_path, sources, name="prompts", **keys):
    """(rows, drops, warnings) of the stage on sources of (name, texts, keys of the source)."""
    entries = []
    for source, texts, more in sources:
        path = tmp_path / f"{source}.jsonl"
        path.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
        entries.append({"name": source, "path": str(path), "verifier": "exact"} | more)
    data = {"sources": entries, "validation": 20, "test": 30} | keys.pop("data", {})
    stage, warnings = stage_in(tmp_path / name, "prompts"), []
    stage.console.warn = warnings.append
    prompts(stage, Recipe.model_validate({"data": data} | keys))
    return (*(read_table(stage.dir / f"{t}.parquet").to_pylist() for t in ("prompts", "drops")), warnings)


def line(drop):
    return int(drop["detail"].split(":")[1])


# ---- near duplicates

def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path):
    texts, draw, known = texts_of(400)
    copies = [changed(text, draw, known) for text in texts[:150]]
    rows, drops, warnings = run(tmp_path, [("s", texts + copies, {})])
    found = {line(d) - 1 for d in drops if d["reason"] == "near_duplicate"} | {  # what is equal but for case and space
        line(d) - 1 for d in drops if d["reason"] == "duplicate"}
    planted = set(range(400, 550))
    assert len(found & planted) / len(planted) >= 0.97, "recall"
    assert not found - planted, "precision"
    assert len(rows) + len(drops) == 550 and Counter(r["source"] for r in rows)["s"] == len(rows)
    example = next(d for d in drops if d["reason"] == "near_duplicate")
    original = int(example["detail"].rsplit(":", 1)[1])
    assert example["prompt_id"] and line(example) == original + 400  # the copy went, and the detail names its original
    assert any("are near duplicates" in w and "templated=true" in w for w in warnings)  # 150 of 550 are many


def test_near_duplicates_are_told_within_a_source_and_only_where_asked(tmp_path):
    texts, *_ = texts_of(300)
    copies = [text + " and again" for text in texts[:100]]
    keep = {"filter": {"decontaminate": 0}}
    for name, sources, keys in (("two", [("a", texts, {}), ("b", copies, {})], keep),
                                ("templated", [("a", texts + copies, {"templated": True})], keep),
                                ("off", [("a", texts + copies, {})], {"filter": {"near_duplicates": 0,
                                                                                 "decontaminate": 0}})):
        rows, drops, _ = run(tmp_path, sources, name, **keys)
        assert len(rows) == 400 and not drops, name
    assert len(run(tmp_path, [("a", texts + copies, {})], "on", **keep)[0]) == 300


@pytest.mark.parametrize("template", [
    "What is {a} + {b}?", "Tom has {a} apples and buys {b} more at the market on Monday. How many apples has he then?",
    "请问{a}加{b}等于多少？", "{a}, {b}"])
def test_what_a_template_writes_makes_nothing_alike(template, tmp_path):
    texts = [template.format(a=a, b=b) for a in range(20, 40) for b in range(20, 40)]
    rows, drops, warnings = run(tmp_path, [("s", texts, {})])
    assert len(rows) == 400 and not drops and not warnings


def test_rows_of_several_parts_are_alike_if_every_part_is():
    texts, *_ = texts_of(4)
    asked, one, two, _ = texts
    rows = [(asked, one), (asked, two), (asked + " now", one + " now"), (two, one)]
    assert [(i, j) for i, j, _ in near_duplicates(rows, 0.7)] == [(2, 0)]


# ---- overlap with held-out prompts

INSTRUCTION = "Read the question below with care, think about it step by step, then answer in one short sentence."


def test_planted_contamination_is_found_and_nothing_else(tmp_path):
    """Held-out prompts, known by a first run, come back inside longer prompts of another source."""
    texts, draw, known = texts_of(600)
    texts = [f"{INSTRUCTION} {text}" for text in texts]
    clean, _, _ = run(tmp_path, [("a", texts, {})], "clean")
    held = [r["messages"][-1]["content"].removeprefix(INSTRUCTION).split() for r in clean if r["split"] != "train"]
    assert len(held) == 50 and not [d for d in run(tmp_path, [("a", texts, {})], "again")[1]]
    other, *_ = texts_of(300, seed=1)
    planted = []
    for i, own in enumerate(held):
        around = other[i].split()
        own = [*own, draw.choice(known)] if i % 3 else own[:-2]  # with more behind it, or cut short
        planted.append(" ".join([*around[:6], *(word.upper() for word in own), *around[6:]]) + "!")
    shared = [f"{INSTRUCTION} {text}" for text in other[50:]]  # the instruction alone is no contamination
    rows, drops, _ = run(tmp_path, [("a", texts, {}), ("b", planted + shared, {})], "dirty")
    held_ids = {r["prompt_id"] for r in rows if r["split"] != "train"}
    gone = [d for d in drops if d["reason"] == "contaminated"]
    assert all(d["detail"].rsplit(" ", 1)[1] in held_ids for d in gone)
    # which prompts are held out depends on both sources: the truth is what is still held out of `a`, and not of `b`
    origins = [r["prompt_id"] for r in clean if r["split"] != "train"]
    own = {r["messages"][-1]["content"] for r in rows if r["split"] != "train" and r["source"] == "b"}
    truth = {i for i, (origin, text) in enumerate(zip(origins, planted, strict=True))
             if origin in held_ids and text not in own}
    found = {line(d) - 1 for d in gone if d["source"] == "b"}
    assert len(truth) > 15 and len(found & truth) / len(truth) >= 0.97, "recall"
    # what else is planted repeats no held-out prompt; of `a` only what a held-out prompt of `b` repeats may go
    assert not found - truth and len([d for d in gone if d["source"] == "a"]) <= len(own), "precision"
    off, drops, _ = run(tmp_path, [("a", texts, {}), ("b", planted + shared, {})], "off", filter={"decontaminate": 0})
    assert not drops and len(off) == 900


def test_numbers_tell_questions_of_a_template_apart():
    asked = "Find the greatest common divisor of these two numbers: {a}, {b}. Give only the number as your answer."
    texts = [asked.format(a=a, b=b) for a in range(2, 42) for b in range(2, 42)]
    random.Random(0).shuffle(texts)
    held = HeldOut([(text, "s", text) for text in texts[:200]], 8)
    held.survey(texts)
    assert not [text for text in texts[200:] if held.match(text, "s")]
    assert held.match(f"By the way: {texts[0]}")[0] == texts[0]


def test_templated_sources_count_only_whole_prompts():
    kin = "Ann is married to Bob. They have a child called Cid. Cid is married to Eve. How is Ann related to {}?"
    held = HeldOut([("h", "kin", kin.format("Eve"))], 8, {"kin"})
    other = kin.format("Bob")
    assert held.match(other, "elsewhere")[0] == "h" and held.match(other, "kin") is None
    assert held.match(kin.format("EVE").upper(), "kin")[0] == "h"


def test_short_held_out_prompts():
    held = HeldOut([("a", "s", "Who wrote Faust, and when?"), ("b", "s", "Hello!"), ("c", "s", "???")], 8)
    assert held.match("Tell me this: who wrote Faust and when? Be brief.")[0] == "a"
    assert held.match("hello")[0] == "b" and held.match("hello there, how are you today") is None
    assert held.match("") is None and held.match("who wrote what and when") is None


def test_nothing_left_to_train_on_says_why(tmp_path):
    texts, *_ = texts_of(40)
    with pytest.raises(UserError, match=r"leave nothing to train on.*\(dropped: near_duplicate 40\)"):
        run(tmp_path, [("a", [*texts, *(t + " so" for t in texts)], {})], data={"validation": 20, "test": 30})


# ---- quality

def test_repetition():
    draw = random.Random(0)
    plain = [draw.randrange(1000) for _ in range(200)]
    assert repetition(plain) == 0 and repetition([]) == 0 and repetition([1] * 20) == 0  # too short to tell
    assert repetition([1] * 100) > 0.98 and repetition(plain[:40] * 4) > 0.7
    assert repetition("a line\n" * 40) > 0.9


SENTENCES = ["The river rises in the hills to the north of the old town.", "Nobody had crossed it for many years!",
             "In spring, when the snow melts, it floods the fields.", "Why did the people stay there at all?",
             "They had built their houses on the higher bank."]
WHOLE = [" ".join(SENTENCES), "\n\n".join(SENTENCES), "42", "The answer is 42", "Paris", "yes", "x = 3\ny = 4", "",
         "- wear a helmet on your head\n- drink enough water on the way\n- tell a friend where you go", "Sorry :(",
         "```python\nprint('a')\n```", "<think>a b</think> so it is", "I agree. Yes. Kind regards,\nJohn",
         "これは本です。", "See the list. It is long. It has:\n1. apples\n2. pears",
         "See it. It has:\n1. apples\n2. green pears", "It works. I thank you. Best, John",
         "**Done.** It works. \\boxed{7}"]


WHOLE += [
    # answers
    "Plants need light to grow. The leaves take it in. The answer is B", "It takes two hours. We left. Answer: Paris",
    "We add the two sides. Then we halve the sum.\n\nFinal answer: x", "She was born in Lyon. So the answer is yes",
    "It is short. It is sweet. See https://example.org/a", "See it. Read it. <https://example.org/a?b=c,d>",
    "One. Two. It costs 3 €", "One. Two. x² + y²", "One. Two. $x = 3$", "One. Two. \\[x = 3\\]", "It is so.\n$$x$$",
    "It is so. \\boxed{\\frac{1}{2}}", "\\begin{align}a\\begin{cases}b\\end{cases}\\end{align}", "]0, 1[",
    "x in [0, 1[", "The sign for addition is +", "He got an A+", "I like C++", "Use the four operators + - × ÷",
    # lists, tables, markup, data
    "Do it. Now.\n- red\n- green apples", "Here. Now.\n| a | b |\n|---|---|\n| 1 | 2 |", "A. B.\n<ul><li>x</li></ul>",
    "a,b,\n1,2,\n3,4,", "name: x\nports:\n  web:", '{"a": [1, {"b": "}{"}]}', '[["a"], ["b"]]', "[1, 2) is half open",
    '{"a": "an \\"open\\" word"}', "{x | x > 0}", "Title\n=====", "one: 1\ntwo: 2", "Note. End.\n\n---", "key = value",
    # code
    "int main() { return 0; }", "x = f(3);\nreturn x;", "One.\n\n```c\nint x[] = {\n```", "~~~\na\n~~~", "std::",
    "Type ``` to open a block.", "`f(`", "The tag `<think>` opens it", "> ```\n> x = 1\n> ```", "1. ```\n   x\n   ```",
    "````md\n```\nx\n````", "Put it in <answer> tags", "Write ```x``` inline", "SELECT a FROM b WHERE c",
    # people
    "Thank you. See you. :-(", "No. Never. :'(", "Good. Fine. 🙂", "Good. Fine. :smile:", "Oh no. Why. D:",
    "I agree. Yes. Yours,\nAnn B. Clark", "“It is. It was,” she said", "He came. „Hallo“", "Sie kam. »Hallo«",
    # other languages and scripts
    "Es regnet. Wir gehen. Bis morgen", "Il joue. Il gagne. Il a marqué un but", "Elle court. Une médaille en or",
    "Jeg ser. Der er en and", "Chúc bạn ngủ ngon. Hẹn gặp lại. Chúc bình an", "今日は晴れ。散歩する。また明日",
    "Идёт дождь. Мы идём. До завтра", "مرحبا. كيف حالك؟ إلى اللقاء", "ฝนตก เราไป แล้วพบกัน", "비가 온다. 간다. 내일 봐요",
    "Τι κάνεις; Καλά; Πού πας;", "यह एक किताब है।",
    # words that a text speaks of
    "It is short. The most common word in English is the", "The stop words of it are a, an, the",
    "Turn the light in it on", "It is the key to the sentence: the conjunction or", "This is what it is made of",
    "It is an AND gate or an OR",
]
OPEN = [
    "```python\nprint('a')", "Here:\n\n```\nx\n```\n\n```py\ny", "> ```\n> x = 1", "- ```\n  x", "````md\n```\nx\n```",
    "<think> first of all", "We think.\n<think>\nSo", "<think>a</think> So. <answer>4", "[THINK]maybe 5",
    "See \\begin{align} x &= 3", "So\n\\[\n x = 3", "It is \\boxed{\\frac{1}{2}", "So\n$$\nx = 3",
    '{"a": [1, {"b": 2}', '{"a": "op', '[{"a": 1},',
    "a, b,", "It has these steps:", "f = 3 * (", "まず、", "首先，", "步骤如下：", "أولا،", "3 + 4 =", "So (x + 1) =",
    "The river is long. It rises in the hills to the north of the", "It was cold in the hills because",
    "She went to the market in town and bought bread and",
]


@pytest.mark.parametrize("text", WHOLE)
def test_whole_texts_are_left_alone(text):
    assert truncation(text) == ""


@pytest.mark.parametrize("text", OPEN)
def test_open_ends(text):
    assert truncation(text)


@pytest.mark.parametrize("text", [" ".join(SENTENCES), "\n".join(SENTENCES)])
def test_cut_prose_is_found_at_open_words_and_commas_only(text):
    """A cut between two other words leaves what may be an answer without a full stop."""
    own = text.split(" ")
    for n in range(1, len(own)):
        cut = " ".join(own[:n])
        last = cut.splitlines()[-1].split()
        found = cut.endswith(",") or (last[-1] in ("the", "and", "their") and len(last) > 3)
        if n > 12:  # enough English
            assert bool(truncation(cut)) == found, cut


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("`<>/think[]{}()$\\:;=,\n begin\"'あ،“»")))
def test_any_text_is_judged(text):
    assert isinstance(truncation(text), str)


# ---- ready-made data

def read(tmp_path, rows, make, filters=None, held=None, **keys):
    path = tmp_path / "ready.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    drops = Drops(stage_in(tmp_path, "select"))
    data = ReadyData(name="mine", path=str(path), **keys)
    found = make(tokenizer_of("chatml"), data, filters or Filter(), held, drops, Quarantine(0))
    return [r["row_id"] for r in found], [(line(d), d["reason"]) for d in drops.rows]


def test_ready_rows_with_planted_defects(tmp_path):
    texts, draw, known = texts_of(40)
    good = [{"messages": turns(a, b)} for a, b in zip(texts[:20], texts[20:], strict=True)]
    held = HeldOut([("h", "s", " ".join(draw.choice(known) for _ in range(15)))], 8)
    bad = [({"messages": turns(f"Answer this: {' '.join(held.words['h'])}", texts[0])}, "contaminated"),
           ({"messages": turns("hi", "one", " ".join(held.words["h"]), "two")}, "contaminated"),
           ({"prompt": "go on", "completion": "and on " * 30}, "repetitive"),
           ({"prompt": turns("code?"), "completion": [{"role": "assistant", "content": "```\nx = 1"}]}, "truncated"),
           ({"messages": turns(texts[3] + " please", texts[23])}, "near_duplicate")]
    rows, drops = read(tmp_path, [*good, *(row for row, _ in bad)], ready_sft, held=held)
    assert rows == [f"mine/{i}" for i in range(1, 21)]
    assert sorted(drops) == [(21 + i, reason) for i, (_, reason) in enumerate(bad)]
    rows, drops = read(tmp_path, [row for row, _ in bad], ready_sft, Filter(max_repetition=1, keep_truncated=True),
                       near_duplicates=False)
    assert len(rows) == 5 and not drops
    rows, drops = read(tmp_path, good[:2], ready_sft, Filter(min_tokens=1000))
    assert not rows and drops == [(1, "too_short"), (2, "too_short")]


def test_of_ready_pairs_only_chosen_must_be_good(tmp_path):
    loop, open_end = "and on " * 30, "It is:"
    rows = [{"prompt": "p", "chosen": "good.", "rejected": loop}, {"prompt": "p", "chosen": loop, "rejected": "bad"},
            {"prompt": "p", "chosen": "good.", "rejected": open_end},
            {"prompt": "p", "chosen": open_end, "rejected": "x"}]
    assert read(tmp_path, rows, ready_pairs) == (["mine/1", "mine/3"], [(2, "repetitive"), (4, "truncated")])


def test_several_answers_to_one_prompt_are_no_near_duplicates(tmp_path):
    texts, *_ = texts_of(5, low=60, high=80)
    rows = [{"prompt": texts[0], "completion": f"{n}"} for n in ("yes", "no", "perhaps")]
    assert len(read(tmp_path, rows, ready_sft)[0]) == 3
    pairs = [{"prompt": texts[0], "chosen": texts[1], "rejected": t} for t in texts[2:]]
    assert len(read(tmp_path, pairs, ready_pairs)[0]) == 3


def test_ready_data_is_held_against_prompts_without_their_template(tmp_path):
    texts, *_ = texts_of(200, low=6, high=7)  # shorter than an n-gram, and the template is not part of them
    source = ("s", texts, {"prompt_template": "Q: {prompt} A (one letter):", "system_prompt": "Be brief."})
    rows, *_ = run(tmp_path, [source])
    recipe = Recipe.model_validate({"data": {"sources": [{"name": "s", "path": "x", "verifier": "exact",
                                                          "prompt_template": "Q: {prompt} A (one letter):"}]}})
    held = held_out_of(tmp_path / "prompts", recipe.filter.decontaminate, sources_of(recipe))
    asked = {r["split"]: r["messages"][-1]["content"][3:-len(" A (one letter):")] for r in rows}
    ready = [{"prompt": asked[split], "completion": "a"} for split in ("test", "validation", "train")]
    assert read(tmp_path, ready, ready_sft, held=held) == (["mine/3"], [(1, "contaminated"), (2, "contaminated")])
    assert held_out_of(tmp_path / "prompts", 0, sources_of(recipe)) is None


def test_prompts_that_repeat_themselves_are_dropped(tmp_path):
    texts, *_ = texts_of(100)
    rows, drops, _ = run(tmp_path, [("s", [*texts, "buy now " * 60], {})])
    assert len(rows) == 100 and [(d["reason"], line(d)) for d in drops] == [("repetitive", 101)]


def by_definition(prompts, n, surveyed, text):
    """Ids of the prompts that `text` repeats, by sets of places and every pair."""
    def grams(own, size):
        return [(i, tuple(own[i:i + size])) for i in range(len(own) - size + 1)]

    counts = Counter(gram for other in surveyed for gram in {gram for _, gram in grams(words(other), 3)})
    common = {gram for gram, times in counts.items() if times > max(0.05 * len(surveyed), 5)}
    found, mine = [], words(text)
    for name, prompt in prompts:
        own = words(prompt)
        size = min(n, len(own))
        told = set(range(len(own))) - {i + k for i, gram in grams(own, 3) if gram in common for k in range(3)}
        shared = {gram for _, gram in grams(mine, size)} if size >= min(n, 5) else set()
        covered = {i + k for i, gram in grams(own, size) if gram in shared and not told.isdisjoint(range(i, i + size))
                   for k in range(size)}
        least = min(len(told), max(n, min(1.5 * n, len(told) / 2)))
        if (own and own == mine) or (covered and len(covered & told) >= least):
            found.append(name)
    return found


PHRASES = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), max_size=14).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(PHRASES, min_size=1, max_size=8), st.lists(PHRASES, max_size=12), PHRASES, st.integers(1, 6))
def test_contamination_is_that_of_the_definition(held, surveyed, text, n):
    prompts_ = [(f"{i:02}", prompt) for i, prompt in enumerate(held)]
    index = HeldOut([(name, "s", prompt) for name, prompt in prompts_], n)
    index.survey(surveyed)
    found, expected = index.match(text), by_definition(prompts_, n, surveyed, text)
    assert (found is None) == (not expected) and (found is None or found[0] in expected)
