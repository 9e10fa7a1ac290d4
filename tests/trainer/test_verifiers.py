import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import verdicts
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.trainer.errors import UserError
from strop.trainer.scoring.numbers import answered
from strop.trainer.scoring.rules import ARGUMENTS, check, check_answer, verify
from strop.trainer.scoring.sandbox import Child

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")


def score(verifier, completion, answer, metadata=None, **args):
    return verify(verifier, completion, answer, args, metadata or {})[0]


# ---- verdicts of a careful reader

@pytest.mark.parametrize("answer,completion,right", verdicts.NUMBER)
def test_number_verdicts(answer, completion, right):
    assert score("number", completion, answer) == right


@pytest.mark.parametrize("answer,completion,right", verdicts.EXACT)
def test_exact_verdicts(answer, completion, right):
    assert score("exact", completion, answer) == right and check_answer("exact", {}, answer, {}) is None


@pytest.mark.parametrize("answer,completion,right,choices", verdicts.CHOICE)
def test_choice_verdicts(answer, completion, right, choices):
    assert score("choice", completion, answer, choices=choices) == right


@pytest.mark.parametrize("answer,completion,right,pattern", verdicts.REGEX)
def test_regex_verdicts(answer, completion, right, pattern):
    assert score("regex", completion, answer, pattern=pattern) == right


@needs_math
@pytest.mark.parametrize("answer,completion,right", verdicts.MATH)
def test_math_verdicts(answer, completion, right):
    assert score("math", completion, answer) == right and check_answer("math", {}, answer, {}) is None


@needs_math
@pytest.mark.parametrize("verifier,answer,completion,right", verdicts.MORE)
def test_more_verdicts(verifier, answer, completion, right):
    args = {"choice": {"choices": verdicts.CAPITALS}, "regex": {"pattern": r"ANSWER: ([\d,.]+)"}}.get(verifier, {})
    assert score(verifier, completion, answer, **args) == right and check_answer(verifier, args, answer, {}) is None


GRID = "2 4 1 3\n3 1 4 2\n4 2 3 1\n1 3 2 4"


@needs_gym
@pytest.mark.parametrize("dataset,answer,completion,right", [
    *(("mini_sudoku", GRID, form.format(GRID), 1) for form in (
        "{}", "The answer is:\n{}", "Here is the solution:\n\n{}", "Done.\n```\n{}\n```\nI checked every row.",
        "<think>Row 1 is 1 1 1 1.</think>{}", "<answer>\n{}\n</answer>")),
    ("mini_sudoku", GRID, f"<think>{GRID}</think>", 0),
    ("letter_counting", "1", "The letter appears 1 times.", 1), ("letter_counting", "1", "It appears 11 times.", 0),
    ("fraction_simplification", "$244/607$", "\\boxed{244/607}", 1),
    ("fraction_simplification", "$244/607$", "\\boxed{488/1214}", 0),  # not simplified, which was asked for
    ("products", "2203636302", "Solution:\nI split it: 10 * 3 = 30, and so on. In all it is 2203636302.", 1)])
def test_gym_verdicts(dataset, answer, completion, right):
    solution = [list(map(int, row.split())) for row in GRID.splitlines()]
    inner = {"source_dataset": dataset, "puzzle": [[0, *row[1:]] for row in solution], "solution": solution,
             "simplified_numerator": 244, "simplified_denominator": 607, "numerator": 17080, "denominator": 42490}
    assert (score("reasoning_gym", completion, answer, {"answer": answer, "metadata": inner}) >= 0.99) == right


# ---- numbers

def render(value: Fraction) -> list[str]:
    """Ways to write `value`, a number of hundredths."""
    n, sign = abs(value), "-" if value < 0 else ""
    over, under = n.numerator, n.denominator
    decimal = f"{float(n):.2f}"
    whole, cents = decimal.split(".")
    groups = f"{int(whole):,}"
    ways = [decimal, f"{groups}.{cents}", f"{groups.replace(',', '{,}')}.{cents}", f"{whole},{cents}", f"${decimal}$",
            f"{groups.replace(',', chr(0x202f))}.{cents}", f"{groups.replace(',', ' ')}.{cents}", f"{decimal} cm",
            f"${groups}.{cents}", f"{decimal} dollars", f"{decimal}\\text{{ m}}^2", f"{over * 100 // under}e-2",
            f"{over * 100 // under} \\times 10^{{-2}}", f"{over * 100 // under} × 10⁻²", f"{decimal} km/h"]
    if n >= 1000:
        ways.append(f"{groups.replace(',', '.')},{cents}")
    if under > 1:
        ways += [f"{over}/{under}", f"\\frac{{{over}}}{{{under}}}", f"\\dfrac{{{over * 3}}}{{{under * 3}}}",
                 f"{over * 7}/{under * 7}"]
        if over > under:
            ways += [f"{over // under} {over % under}/{under}", f"{over // under}\\frac{{{over % under}}}{{{under}}}"]
    else:
        ways += [str(over), groups, f"{over}.", f"{over}\\%".replace("\\%", "")]
    ways = [sign + way for way in ways]
    return [*ways, *(f"\u2212{way[1:]}" for way in ways if sign), *(f"minus {way[1:]}" for way in ways[:1] if sign)]


WRAPPERS = ["{}", "The answer is {}.", "**Answer:** {}", "\\boxed{{{}}}", "<answer>{}</answer>", "So $x = {}$.",
            "First 3 + 4 = 7.\nIn the end it is {}.", "<think>It is 99 or \\boxed{{98}}.</think>\nIt is {}",
            "### Final answer\n\n{}\n\nNote: this took 2 steps.", "The answer is 97. Wait, no, it is {}",
            "{} (about 96.5)", "The answer is \\(\\boxed{{\\text{{{}}}}}\\).", "It is not 95 but {}",
            "hm 94</think>{}", "It comes to **{}**"]


@settings(max_examples=150, deadline=None)
@given(st.integers(-200_000_000, 200_000_000), st.sampled_from(WRAPPERS), st.data())
def test_every_rendering_of_a_number_is_its_value_and_no_other(hundredths, wrapper, data):
    value = Fraction(hundredths, 100)
    way = data.draw(st.sampled_from(render(value)))
    if "$" in way and "$" in wrapper:
        way = way.replace("$", "")
    text = wrapper.format(way)
    assert score("number", text, f"{float(value):.2f}") == 1, text
    for other in (value + 1, -value or 1, value * 10 or 2, value + Fraction(1, 100)):
        assert score("number", text, f"{float(other):.2f}") == 0, (text, other)


@pytest.mark.parametrize("text", [
    "", "none", "x2", "H2O_3", "\\boxed{1, 2, 3}", "<answer>1 2 3</answer>", "9" * 400, "1e9999", "\u0663", "9" * 5000,
    "10/2", "10 - 5", "2\\sqrt{3}", "3\\pi", "2x", "12:30", "x > 5", "\\pm 4", "3 apples and 5 pears", "4 to the ^"])
def test_no_number(text):
    assert score("number", text, "5") == 0 and (text[:1] == "4" or answered(text) == [])


@pytest.mark.parametrize("listing", [
    "1 2 3 4 5 6 7 8 9 10 11", "It could be 7, 8 or 9", "\\boxed{7} \\boxed{8}", "\\boxed{7, 8}", "7 or 8", "8\n7 or 8",
    "the answer is 7. The answer is 9.", "<answer>7</answer><answer>8</answer>", "<answer>8 7</answer>", "7 ... 0",
    "The answer is 8 or 7.", "\\boxed{8} or \\boxed{7}", "8, 7", "8 and 7", "The answer is 7, 8."])
def test_listing_numbers_earns_nothing(listing):
    gym = {"answer": "7", "metadata": {"source_dataset": "chain_sum"}}
    assert score("number", listing, "7") == 0
    assert score("reasoning_gym", listing, "7", gym) == 0


def test_tolerance_is_absolute_and_exact_by_default():
    assert score("number", "0.3333", "1/3") == 0
    assert score("number", "0.3333", "1/3", tolerance=1e-3) == 1
    assert score("number", "1001", "1000", tolerance=0.5) == 0


# ---- exact, choice, regex, math

@pytest.mark.parametrize("completion,good", [
    ("Paris", 1), ("  **paris.** ", 1), ("The answer is Paris.", 1), ("\uff30aris", 1), ("\\boxed{Paris}", 1),
    ("Paris or London", 0), ("Par", 0), ("", 0)])
def test_exact(completion, good):
    assert score("exact", completion, "Paris") == good


CHOICES = ["red", "green", "dark green", "It rains"]


@pytest.mark.parametrize("completion,answer,good", [
    ("B", "B", 1), ("(B)", "green", 1), ("b", "B", 1), ("B) green", "B", 1), ("green", "B", 1),
    ("The answer is B.", "B", 1),
    ("The answer is (B) green", "B", 1), ("I think\nit is dark green", "C", 1), ("I think it is green", "B", 1),
    ("A or B", "B", 0), ("A, B, C, D", "D", 0), ("(A) (B)", "B", 0), ("red or green", "B", 0), ("C", "B", 0),
    ("A good day", "A", 0), ("B) red", "B", 0), ("E", "B", 0), ("", "B", 0), ("it rains!", "D", 1)])
def test_choice(completion, answer, good):
    assert score("choice", completion, answer, choices=CHOICES) == good
    arc = {"choices": {"label": ["A", "B", "C", "D"], "text": CHOICES}}
    assert score("choice", completion, answer, arc) == good


def test_choice_by_numbered_label():
    options = {"choices": {"label": ["1", "2"], "text": ["cat", "dog"]}}
    assert score("choice", "2", "2", options) == 1 and score("choice", "dog", "2", options) == 1


@pytest.mark.parametrize("completion,answer,pattern,good", [
    ("def f(): pass", None, r"def \w+\(", 1), ("none", None, r"def \w+\(", 0),
    ("ANSWER: Foo", "foo", r"ANSWER: (\w+)", 1), ("ANSWER: foo ANSWER: bar", "foo", r"ANSWER: (\w+)", 0)])
def test_regex(completion, answer, pattern, good):
    assert score("regex", completion, answer, pattern=pattern) == good


@needs_math
@pytest.mark.parametrize("completion,good", [
    ("so $\\frac{1}{2}$", 1), ("0.5", 1), ("\\boxed{\\frac{2}{4}}", 1), ("1, 2, 0.5, 3", 0), ("$x$", 0), ("", 0),
    ("\\boxed{" * 50, 0)])
def test_math(completion, good):
    assert score("math", completion, "\\frac{1}{2}") == good


# ---- reasoning-gym

@needs_gym
@pytest.mark.parametrize("dataset,answer,completion,good", [
    ("chain_sum", "1", "10", 0),  # the library gives half a point
    ("chain_sum", "1", "The answer is 1.", 1), ("chain_sum", "1234", "1,234.0", 1),
    ("chain_sum", "-4", "5 - 9 = -4", 1),
    ("gcd", "1", "11", 0), ("gcd", "12", "GCD(24, 36) = 12", 1), ("gcd", "12", "24, 36", 0), ("gcd", "12", "", 0),
    ("caesar_cipher", "HELLO", "HELLO WORLD", 0),  # and so it does here
    ("caesar_cipher", "HELLO", "The answer is: HELLO", 1)])
def test_reasoning_gym(dataset, answer, completion, good):
    entry = {"question": "?", "answer": answer, "metadata": {"source_dataset": dataset}}
    assert score("reasoning_gym", completion, answer, entry) == good
    assert score("reasoning_gym", completion, answer, {"metadata": {}}, dataset=dataset) == good
    assert score("reasoning_gym", completion, answer, {"answer": "a column of another name"}, dataset=dataset) == good


@needs_gym
def test_graded_scores_of_a_generator_are_kept():
    import reasoning_gym

    entry = json.loads(json.dumps(reasoning_gym.create_dataset("mini_sudoku", size=1, seed=1)[0]))
    half = entry["answer"][:-1] + str(int(entry["answer"][-1]) % 4 + 1)
    assert score("reasoning_gym", entry["answer"], entry["answer"], entry) == 1
    assert 0 < score("reasoning_gym", half, entry["answer"], entry) < 0.99


@needs_gym
@pytest.mark.parametrize("dataset", [
    "countdown", "chain_sum", "word_sorting", "knights_knaves", "sudoku", "simple_integration",
    "polynomial_multiplication", "bitwise_arithmetic", "number_sorting", "n_queens"])
def test_every_entry_passes_its_own_verifier_after_json(dataset):
    import reasoning_gym

    generated = reasoning_gym.create_dataset(dataset, size=3, seed=1)
    for i in range(3):
        entry = json.loads(json.dumps(generated[i]))
        assert check_answer("reasoning_gym", {}, entry["answer"], entry) is None


@needs_gym
@pytest.mark.parametrize("hostile", [
    "__import__('os').mkdir({path!r})", "open({path!r}, 'w')", "().__class__.__base__.__subclasses__()",
    "(lambda: exit())()", "[f for f in [print]][0](1)", "exec('1')", "9**9**9**9**9"])
@pytest.mark.parametrize("dataset", ["countdown", "string_insertion", "polynomial_multiplication"])
def test_what_a_model_writes_is_not_executed(dataset, hostile, tmp_path, monkeypatch):
    import reasoning_gym

    monkeypatch.setattr("strop.trainer.scoring.rules.GYM_SECONDS", 1.0)

    entry = json.loads(json.dumps(reasoning_gym.create_dataset(dataset, size=1, seed=1)[0]))
    began = time.perf_counter()
    assert score("reasoning_gym", hostile.format(path=str(tmp_path / "made")), entry["answer"], entry) < 0.5
    assert not (tmp_path / "made").exists() and time.perf_counter() - began < 10


# ---- robustness

HOSTILE = ["\\boxed{" * 5000, "{" * 20000, "<answer>" * 3000, "answer is " * 3000, " " * 50000, "1 " * 20000,
           "-" * 20000,
           "answer is" + " " * 30000 + "x", "1" + "," * 20000, "1,111" * 5000, "$" * 20000, "1/" * 10000, "\x00\ud800",
           "\\frac{" * 5000, "1e" * 10000, "(" * 20000, "9" * 100000, "a" * 30 + "!", "\n" * 20000, "A, " * 7000,
           "not A " * 3000, "wait, no, " * 2000 + "5", "<think>" * 3000,
           "½" * 9000, "\\text{" * 4000, "^{" * 10000, "5 or " * 4000, "#### 1\n" * 3000, "A is " * 4000]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_neither_crash_nor_hang(completion):
    entry = {"metadata": {"source_dataset": "chain_sum"}}
    for _ in range(3):  # at best: on a busy machine, or while garbage is collected, the same work takes longer
        began = time.thread_time()
        for verifier, args, metadata in (("number", {}, {}), ("exact", {}, {}), ("choice", {"choices": CHOICES}, {}),
                                         ("reasoning_gym", {}, entry)):
            assert 0 <= score(verifier, completion, "4", metadata, **args) <= 1
        if (took := time.thread_time() - began) < 2:
            break
    assert took < 2


@settings(max_examples=300, deadline=2000)
@given(st.text(alphabet=st.sampled_from("0123456789.,-+/$eE^*= \n{}\\()abAB:"), max_size=60))
def test_any_text_scores(text):
    for verifier, args in (("number", {}), ("exact", {}), ("choice", {"choices": CHOICES})):
        value, extracted = verify(verifier, text, "4", args, {})
        assert value in (0.0, 1.0) and (extracted is None or isinstance(extracted, str))


def test_catastrophic_pattern_is_stopped_and_the_next_one_works():
    began = time.perf_counter()
    assert score("regex", "a" * 40 + "!", None, pattern=r"(a+)+$") == 0
    assert time.perf_counter() - began < 10
    assert score("regex", "aaa", None, pattern=r"(a+)+$") == 1


def test_child_answers_threads_one_at_a_time():
    results = {}

    def judge(i):
        results[i] = verify("regex", f"ANSWER: {i}", None, {"pattern": r"ANSWER: (\d+)"}, {})

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {i: extracted for i, (_, extracted) in results.items()} == {i: f"ANSWER: {i}" for i in range(20)}


def test_child_starts_again_after_it_died():
    child = Child()
    task = {"pattern": "a", "text": "a", "answer": None}
    assert child.judge("regex", task, 10)["score"] == 1
    child._process.kill()
    child._process.wait()
    assert child.judge("regex", task, 10)["score"] == 1
    child.close()


def test_child_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    child = Child()
    child.judge("regex", {"pattern": "a", "text": "a", "answer": None}, 10)
    with open(f"/proc/{child._process.pid}/environ", "rb") as f:
        assert b"secret" not in f.read()
    child.close()


# ---- nothing that comes with data runs

SHELL = "__import__('os').system('touch {path}') or 5"
ESCAPED = "exec\\\n(\"" + "".join(f"\\x{b:02x}" for b in b"import os; os.mkdir('made')") + "\")"


@needs_gym
@pytest.mark.parametrize("text", [
    SHELL, ESCAPED, "[c for c in ().__class__.__base__.__subclasses__()]", "print.__self__", "(lambda: 5)()",
    "open('{path}', 'w')", "eval('5')", "f'{{__import__}}'", "Symbol.__init__", "getattr(5, 'real')",
    "5 if exit() else 6"])
def test_no_text_of_a_row_is_evaluated_in_either_process(text, tmp_path):
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    path, seen = tmp_path / "made", []
    text = text.format(path=path) if "{path}" in text else text
    in_this_process = [True]
    sys.addaudithook(lambda event, args: seen.append(args[0]) if in_this_process and event == "compile" else None)
    for dataset in ("bitwise_arithmetic", "spiral_matrix", "string_insertion", "n_queens", "binary_matrix", "countdown",
                    "number_sorting", "puzzle24", "polynomial_multiplication", "simple_integration"):
        assert dataset in DATASETS
        entry = json.loads(json.dumps(reasoning_gym.create_dataset(dataset, size=1, seed=1)[0]))
        hostile = {k: text if isinstance(v, str) else v for k, v in entry["metadata"].items()}
        hostile |= {"source_dataset": dataset, "problem": text, "integrand": text, "variable": "x"}
        seen.clear()
        for completion, answer in (("5", "5"), (text, "5"), ("5", text), (f"<answer>{text}</answer>", text)):
            check_answer("reasoning_gym", {}, answer, {"metadata": hostile})
            verify("reasoning_gym", completion, answer, {}, {"answer": answer, "metadata": hostile})
        assert text not in seen
    in_this_process.clear()
    assert not path.exists() and not (Path.cwd() / "made").exists()


ESCAPES = """
import ast, ctypes, os, socket, sys
from strop.trainer.scoring import sandbox
sandbox._confine()
if sys.argv[1] == "audit":
    sys.addaudithook(sandbox._forbid)
    sandbox._armed.append(1)
failed = 0
for attempt in (lambda: open(sys.argv[2], "w"), lambda: os.mkdir(sys.argv[2]), lambda: os.execv("/bin/true", ["true"]),
                lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2)):
    try:
        attempt()
    except OSError:
        failed += 1
os._exit(failed)
"""


@pytest.mark.parametrize("how", ["audit", "kernel"])
def test_a_judge_cannot_write_execute_or_connect(how, tmp_path):
    release = tuple(int(n) for n in os.uname().release.split(".")[:2]) if sys.platform == "linux" else (0, 0)
    if how == "kernel" and release < (6, 7):
        pytest.skip("needs Landlock with TCP, Linux 6.7")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", ESCAPES, how, str(tmp_path / "made"), port], timeout=60)
    if how == "kernel" and done.returncode != 4:
        pytest.skip(f"the kernel forbids {done.returncode} of 4: Landlock is off, or this is a container")
    assert done.returncode == 4 and not (tmp_path / "made").exists()


def test_no_module_of_the_working_directory_is_imported(tmp_path, monkeypatch):
    for name in ("selectors", "json", "re", "strop", "sympy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}")
    child = Child()
    assert child.judge("regex", {"pattern": "a", "text": "a", "answer": None}, 10)["score"] == 1
    child.close()
    assert not (tmp_path / "executed").exists()


@needs_gym
def test_reasoning_gym_loads_where_nobody_has_used_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("MPLCONFIGDIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    child = Child()
    task = {"dataset": "chain_sum", "text": "3", "entry": {"answer": "3", "metadata": {}}, "strict": True}
    assert child.judge("reasoning_gym", task, 20.0) == {"score": 1.0, "extracted": "3"}
    child.close()


def test_the_limit_is_cpu_time(monkeypatch):
    """A stopped child loses no CPU time. A task that computes for longer than its limit ends, its child does not."""
    child, task = Child(), {"pattern": "(a+)+$", "text": "a" * 40 + "!", "answer": None}
    assert child.judge("regex", task | {"text": "a"}, 1.0)["score"] == 1
    pid = child._process.pid
    pause = threading.Timer(0.1, lambda: (os.kill(pid, signal.SIGSTOP), time.sleep(1.5), os.kill(pid, signal.SIGCONT)))
    pause.start()
    assert child.judge("regex", task | {"text": "a" * 20 + "!"}, 1.0) == {"score": 0.0, "extracted": None}  # no match
    pause.join()
    assert child.judge("regex", task, 0.5) is None
    assert child._process.pid == pid
    child.close()


def test_a_child_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match=r"verifier regex cannot start its process .*false -P -m strop"):
        Child().judge("regex", {}, 1.0)


# ---- what a recipe or its data can get wrong

@pytest.mark.parametrize("verifier,args,match", [
    ("number", {"tolerence": 1}, "tolerence.*it takes: tolerance"), ("number", {"tolerance": -1}, "0 or more"),
    ("number", {"tolerance": "x"}, "must be a number"), ("number", {"tolerance": True}, "must be a number"),
    ("exact", {"case": 1}, "it takes: none"), ("regex", {}, "pattern is missing"),
    ("regex", {"pattern": "("}, "cannot be compiled"),
    ("regex", {"pattern": "a{99999999999}"}, r"pattern.*too large"),
    ("regex", {"pattern": "(" * 3000 + ")" * 3000}, "verifier_args.pattern"),
    ("choice", {"choices": ["a"]}, "at least two"), ("choice", {"choices": ["a", "A "]}, "at least two different"),
    ("reasoning_gym", {"dataset": "chain_sums"}, "did you mean chain_sum")])
def test_wrong_arguments(verifier, args, match):
    with pytest.raises(UserError, match=match):
        check(verifier, args)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package math-verify: pip install 'strop\[math\]'"):
        check("math", {})


@pytest.mark.parametrize("verifier,answer,args,why", [
    ("number", None, {}, "needs an answer"), ("number", "four", {}, "no number"),
    ("number", "12\\sqrt{3}", {}, "use verifier math"), ("number", "12 or 13", {}, "more than one"),
    ("exact", " ", {}, "needs an answer"), ("exact", "x", {}, None), ("choice", "A", {}, "needs verifier_args.choices"),
    ("choice", "F", {"choices": CHOICES}, "fails its own verifier"), ("choice", "red", {"choices": CHOICES}, None),
    ("regex", None, {"pattern": "a"}, None), ("math", "\\frac{1}{2}", {}, None),
    ("math", "x^2+1", {}, None), ("math", "\\sum_{i=1}^{1000000007} \\frac{1}{i^{1/3}}", {}, "takes more than 0.5 s")])
def test_answers_that_can_never_be_met(verifier, answer, args, why):
    found = check_answer(verifier, args, answer, {})
    assert found is None if why is None else why in found


def test_every_verifier_of_the_recipe_is_known():
    from typing import get_args

    from strop.trainer.config import Rule
    assert set(get_args(Rule)) == set(ARGUMENTS)
