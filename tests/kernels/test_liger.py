"""The drop-in for liger_kernel.chunked_loss against Liger itself and against plain PyTorch in fp64."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import in_a_fork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import strop.kernels.integrations.liger as ours
from strop.kernels.head import chunked

PAIRED = ("dpo", "cpo", "simpo", "orpo")
CLASS = {"dpo": "DPO", "cpo": "CPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}
DPO_TYPES = ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
DPO_TYPES += ("discopop",)
PAIRS, TOKENS, WIDTH, VOCAB = 3, 7, 8, 50

# Arguments by the name of the loss: every option of its functional form at least once away from its default.
CASES = [
    *(("dpo", {"loss_type": t, "label_smoothing": 0.2 if t in ("exo_pair", "robust") else 0.0}) for t in DPO_TYPES),
    ("dpo", {"use_ref_model": False, "compute_nll_loss": True, "alpha": 0.7, "beta": 0.3}),
    ("dpo", {"average_log_prob": True, "loss_type": "discopop", "discopop_tau": 0.5, "beta": 2.0}),
    ("cpo", {}),
    ("cpo", {"label_smoothing": 0.2, "alpha": 0.3, "beta": 0.5, "average_log_prob": True}),
    ("cpo", {"compute_nll_loss": False}),
    ("simpo", {}),
    ("simpo", {"label_smoothing": 0.2, "alpha": 0.3, "beta": 2.0, "gamma": 1.5, "compute_nll_loss": True}),
    ("orpo", {}),
    ("orpo", {"beta": 0.4, "nll_target": "given"}),
    ("orpo", {"compute_nll_loss": False}),
    ("kto", {}),
    ("kto", {"kl": "scalar", "beta": 0.5, "average_log_prob": True}),
    ("kto", {"use_ref_model": False}),
]
IDS = [f"{name} {options}" for name, options in CASES]


def _chunked_loss():
    return pytest.importorskip("liger_kernel.chunked_loss")


def _inputs(
    name: str, dtype: torch.dtype, bias: bool = True, needs: tuple = ("_input", "weight", "bias"), seed: int = 3
) -> dict:
    """Tensors by Liger's names; several ignored positions, at least one token per sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = {"_input": (2 * PAIRS, TOKENS, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,)}
    target = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS), generator=generator)
    target[0, :3] = target[2, 6:] = target[4, 1:] = -100
    tensors = {key: normal(*shape).requires_grad_(key in needs) for key, shape in shapes.items()} | {"target": target}
    if name in ("dpo", "kto"):
        tensors |= {f"ref{key if key[0] == '_' else '_' + key}": normal(*shape) for key, shape in shapes.items()}
    if name == "kto":
        tensors["preference_labels"] = torch.tensor([True, False, False, True, True, False])
    if not bias:
        tensors = {key: x for key, x in tensors.items() if "bias" not in key}
    return tensors


def _options(options: dict, tensors: dict) -> dict:
    """The options with the tensors that some of them name."""
    options = dict(options)
    if options.get("nll_target"):
        # As in LigerORPOTrainer the NLL counts positions that the target leaves out; here also two of other tokens.
        generator = torch.Generator().manual_seed(4)
        options["nll_target"] = torch.where(tensors["target"] == -100, 5, tensors["target"])
        options["nll_target"][0, 0], options["nll_target"][1, 2:4] = (
            -100,
            torch.randint(0, 50, (2,), generator=generator),
        )
    if options.get("kl"):
        options["kl"] = torch.tensor(0.3)
    return options


def _positional(function, arguments: dict) -> list:
    """Arguments in the order of function's parameters, defaults where there is none."""
    return [arguments.get(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def _results(function, tensors: dict, arguments: list) -> list[torch.Tensor]:
    """Loss, statistics, and the gradients of twice the loss."""
    loss, statistics = function(*arguments)
    leaves = [x for x in tensors.values() if x.requires_grad]
    return [loss, *statistics, *(torch.autograd.grad(2 * loss, leaves) if leaves else ())]


def _ours(name: str, options: dict, tensors: dict) -> list[torch.Tensor]:
    function = getattr(ours, f"liger_fused_linear_{name}")
    return _results(function, tensors, _positional(function, tensors | options))


def _ligers(name: str, options: dict, tensors: dict) -> list[torch.Tensor]:
    _chunked_loss()
    from liger_kernel.chunked_loss import functional

    function = getattr(functional, f"liger_fused_linear_{name}")
    arguments = tensors | options | {"compiled": False}
    return _results(function, tensors, _positional(getattr(ours, f"liger_fused_linear_{name}"), arguments))


def _truth(name: str, options: dict, tensors: dict) -> list[torch.Tensor]:
    """Liger's documented formulas on materialized logits."""
    x = {key: v.detach().double() if v.is_floating_point() else v for key, v in tensors.items()}
    leaves = [x[key].requires_grad_() for key, v in tensors.items() if v.requires_grad]
    function = inspect.signature(getattr(ours, f"liger_fused_linear_{name}"))
    o = {p.name: p.default for p in function.parameters.values()} | options
    live = x["target"] != o["ignore_index"]
    average = o.get("average_log_prob", name in ("simpo", "orpo"))

    def logits(prefix: str = "") -> torch.Tensor:
        out = x["ref_input" if prefix else "_input"] @ x[f"{prefix}weight"].T
        return out + x[f"{prefix}bias"] if "bias" in x else out

    def token_logps(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ignored = target == o["ignore_index"]
        picked = logits.log_softmax(-1).gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0]
        return picked.masked_fill(ignored, 0.0)

    def sequence_logps(logits: torch.Tensor) -> torch.Tensor:
        sums = token_logps(logits, x["target"]).sum(1)
        return sums / live.sum(1).clamp_min(1) if average else sums

    policy_logits = logits()
    logps = sequence_logps(policy_logits)
    ratio = logps - sequence_logps(logits("ref_")) if o.get("use_ref_model") else logps
    beta, e = o["beta"], o.get("label_smoothing", 0.0)
    if name == "kto":
        labels, z = x["preference_labels"], 0.0 if o["kl"] is None else o["kl"]
        loss = (1 - torch.sigmoid(beta * (ratio - z) * torch.where(labels, 1, -1))).mean()
        statistics = [
            values[side].sum() for values in (logps, policy_logits, beta * ratio) for side in (labels, ~labels)
        ]
    else:
        half = len(logps) // 2
        (c, r), (chosen, rejected) = ratio.split(half), logps.split(half)
        d = beta * (c - r) - (o["gamma"] if name == "simpo" else 0.0)
        good, bad = F.logsigmoid(d), F.logsigmoid(-d)
        odds = torch.logit(chosen.exp()) - torch.logit(rejected.exp())
        kind = "orpo" if name == "orpo" else o.get("loss_type", "sigmoid")
        if kind == "orpo":
            losses = -beta * F.logsigmoid(odds)
        elif kind == "sigmoid":
            losses = -(1 - e) * good - e * bad
        elif kind == "hinge":
            losses = (1 - d).clamp_min(0)
        elif kind == "exo_pair":
            e = torch.tensor(e, dtype=torch.float64)
            losses = d.sigmoid() * (good - (1 - e).log()) + (-d).sigmoid() * (bad - e.log())
        elif kind == "nca_pair":
            losses = -F.logsigmoid(beta * c) - (F.logsigmoid(-beta * c) + F.logsigmoid(-beta * r)) / 2
        elif kind == "robust":
            losses = (-(1 - e) * good + e * bad) / (1 - 2 * e)
        elif kind == "bco_pair":
            losses = -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)
        elif kind == "sppo_hard":
            losses = (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2
        elif kind == "apo_zero":
            losses = 1 - (beta * c).sigmoid() + (beta * r).sigmoid()
        elif kind == "apo_down":
            losses = (beta * c).sigmoid() + 1 - d.sigmoid()
        else:
            m = (d / o["discopop_tau"]).sigmoid()
            losses = -good * (1 - m) + (-d).exp() * m
        nll = torch.zeros((), dtype=torch.float64)
        if o["compute_nll_loss"]:
            target = x["target"] if o.get("nll_target") is None else o["nll_target"]
            tokens = (target[:half] != o["ignore_index"]).sum().clamp_min(1)
            nll = -token_logps(policy_logits[:half], target[:half]).sum() / tokens
        loss = losses.mean() + o.get("alpha", 1.0) * nll
        statistics = [
            chosen,
            rejected,
            policy_logits[:half].mean(),
            policy_logits[half:].mean(),
            nll,
            beta * c,
            beta * r,
        ]
        if name == "orpo":
            statistics += [F.logsigmoid(odds).mean(), odds.mean()]
    return [loss, *statistics, *(torch.autograd.grad(2 * loss, leaves) if leaves else ())]


def _same(found: list, expected: list, **tolerance) -> None:
    assert [tuple(x.shape) for x in found] == [tuple(x.shape) for x in expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), check_dtype=False, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_equals_the_truth_in_fp64(name: str, options: dict, bias: bool):
    tensors = _inputs(name, torch.float64, bias)
    options = _options(options, tensors)
    _same(_ours(name, options, tensors), _truth(name, options, tensors), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_equals_liger_in_fp32(name: str, options: dict):
    tensors = _inputs(name, torch.float32)
    options = _options(options, tensors)
    found, expected = _ours(name, options, tensors), _ligers(name, options, tensors)
    assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in expected]
    for mine, liger in zip(found, expected, strict=True):
        assert (mine - liger).norm() <= 5e-6 * liger.norm()


@pytest.mark.parametrize("name", CLASS)
@pytest.mark.parametrize("needs", [(), ("_input",), ("weight",), ("bias",), ("_input", "bias")], ids=str)
def test_gradients_for_any_subset(name: str, needs: tuple):
    tensors = _inputs(name, torch.float64, needs=needs)
    found = _ours(name, {}, tensors)
    _same(found, _truth(name, {}, tensors), rtol=1e-9, atol=1e-11)
    assert found[0].requires_grad == bool(needs) and not any(x.requires_grad for x in found[1:])


@pytest.mark.parametrize("name", CLASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_ligers(name: str, dtype: torch.dtype):
    """Or twice the rounding of a number of its size, where Liger happens to hit the truth; the errors of several inputs
    together, since of a scalar's one error, chance decides."""
    errors = []
    for seed in range(8):
        tensors = _inputs(name, dtype, seed=seed)
        found, theirs, truth = (function(name, {}, tensors) for function in (_ours, _ligers, _truth))
        errors.append(
            [
                [(x - true).norm().item() for x in (mine, liger)] + [torch.finfo(dtype).eps * true.norm().item()]
                for mine, liger, true in zip(found, theirs, truth, strict=True)
            ]
        )
    for mine, liger, rounding in torch.tensor(errors).norm(dim=0):
        assert mine <= 2 * max(liger, rounding)


@pytest.mark.parametrize("name", CLASS)
@pytest.mark.parametrize("average", [False, True])
def test_a_sequence_without_a_token(name: str, average: bool):
    """Its log-prob is 0 and it has no gradient, where Liger's mean is NaN."""
    tensors = _inputs(name, torch.float64)
    tensors["target"][1] = -100
    options = {"average_log_prob": average} if name in ("dpo", "cpo", "kto") else {}
    found = _ours(name, options, tensors)
    assert all(x.isfinite().all() for x in found)
    assert not found[-3][1].any() and found[-3][0].any()
    if name != "orpo":  # the odds of a mean log-prob of 0 are infinite
        _same(found, _truth(name, options, tensors), rtol=1e-9, atol=1e-11)
    if name in PAIRED:
        tensors["target"][:PAIRS] = -100
        assert all(x.isfinite().all() for x in _ours(name, options | {"compute_nll_loss": True}, tensors))


@pytest.mark.parametrize("name", CLASS)
def test_another_ignore_index(name: str):
    tensors = _inputs(name, torch.float64)
    expected = _ours(name, {}, tensors)
    tensors["target"] = tensors["target"].masked_fill(tensors["target"] == -100, VOCAB + 1)
    _same(_ours(name, {"ignore_index": VOCAB + 1}, tensors), expected, rtol=0, atol=0)


def test_label_smoothing_makes_the_sigmoid_loss_cdpo_and_warns_where_it_means_nothing():
    tensors = _inputs("dpo", torch.float64)
    _same(*(f("dpo", {"label_smoothing": 0.2}, tensors) for f in (_ours, _truth)), rtol=1e-9, atol=1e-11)
    with pytest.warns(UserWarning, match="no effect on loss_type='hinge'"):
        found = _ours("dpo", {"label_smoothing": 0.2, "loss_type": "hinge"}, tensors)
    _same(found, _ours("dpo", {"loss_type": "hinge"}, tensors), rtol=0, atol=0)


def test_the_mean_logit_of_fp16_does_not_overflow():
    """A bias of 3 sums to more than fp16 holds, and Liger's mean is infinite."""
    tensors = _inputs("cpo", torch.float16) | {"weight": torch.randn(4000, WIDTH).half()}
    tensors["bias"] = torch.full((4000,), 3.0, dtype=torch.float16)
    for found, true in zip(_ours("cpo", {}, tensors)[3:5], _truth("cpo", {}, tensors)[3:5], strict=True):
        torch.testing.assert_close(found.double(), true.detach(), rtol=1e-5, atol=0)


def test_kto_takes_a_kl_for_each_sequence():
    """As Liger documents it; its chunks of one sequence would each use the kl of all."""
    tensors = _inputs("kto", torch.float64)
    kl = torch.linspace(-1, 1, 2 * PAIRS, dtype=torch.float64)
    _same(*(f("kto", {"kl": kl}, tensors) for f in (_ours, _truth)), rtol=1e-9, atol=1e-11)
    _same(_ours("kto", {"kl": 0.3}, tensors), _ours("kto", {"kl": torch.tensor([0.3])}, tensors), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CLASS)
def test_the_class_and_the_function_class_pass_everything_on(name: str):
    """The class against Liger's with no option at its default; the Function class against the function."""
    tensors = _inputs(name, torch.float32)
    mine, theirs = (getattr(m, f"LigerFusedLinear{CLASS[name]}Loss") for m in (ours, _chunked_loss()))
    changed = {"ignore_index": 7, "beta": 0.7, "alpha": 0.3, "label_smoothing": 0.2, "gamma": 1.5, "chunk_size": 2}
    changed |= {"compute_nll_loss": True, "use_ref_model": True, "average_log_prob": True, "compiled": False}
    changed |= {"loss_type": "robust", "discopop_tau": 0.5}
    options = {key: value for key, value in changed.items() if key in inspect.signature(mine).parameters}
    assert options.keys() == inspect.signature(mine).parameters.keys()
    tensors["target"][tensors["target"] == -100] = 7
    given = tensors | {
        "lin_weight": tensors["weight"],
        "kl": torch.tensor(0.2),
        "nll_target": tensors["target"].roll(1),
    }
    found, expected = (
        _results(module, tensors, _positional(module.forward, given)) for module in (mine(**options), theirs(**options))
    )
    _same(found, expected, rtol=1e-4, atol=1e-5)
    function = getattr(ours, f"liger_fused_linear_{name}")
    assert getattr(ours, f"LigerFusedLinear{CLASS[name]}Function").apply is function


@pytest.mark.parametrize("name", CLASS)
def test_signatures_are_ligers(name: str):
    chunked_loss = _chunked_loss()
    module = sys.modules[getattr(chunked_loss, f"LigerFusedLinear{CLASS[name]}Loss").__module__]

    def parameters(function, skip: int = 0) -> list:
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()][skip:]

    loss, function = f"LigerFusedLinear{CLASS[name]}Loss", f"LigerFusedLinear{CLASS[name]}Function"
    assert parameters(getattr(ours, loss)) == parameters(getattr(module, loss))
    assert parameters(getattr(ours, loss).forward) == parameters(getattr(module, loss).forward)
    with_ctx = getattr(module, function).forward
    assert parameters(getattr(ours, function).apply) == parameters(with_ctx, skip=1)
    assert parameters(getattr(ours, f"liger_fused_linear_{name}")) == parameters(with_ctx, skip=1)


def test_every_public_name_of_ligers_modules_is_there_flat():
    names = set()
    for file in Path(_chunked_loss().__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets}
    assert sorted(name for name in names if not name.startswith("_")) == sorted(ours.__all__)
    from liger_kernel.chunked_loss import jsd_loss

    assert ours.LigerFusedLinearJSDLoss is jsd_loss.LigerFusedLinearJSDLoss
    assert all(getattr(ours, name) is not None for name in ours.__all__) and set(ours.__all__) <= set(dir(ours))
    with pytest.raises(AttributeError, match="no attribute 'LigerFusedLinearPPO'"):
        _ = ours.LigerFusedLinearPPO


def test_without_liger_ours_work_and_the_rest_says_what_to_install():
    mine = {f"LigerFusedLinear{CLASS[name]}{kind}" for name in CLASS for kind in ("Loss", "Function")}
    mine |= {f"liger_fused_linear_{name}" for name in CLASS}

    def check():
        for name in list(sys.modules):
            if name.partition(".")[0] == "liger_kernel" or name.startswith(ours.__name__):
                del sys.modules[name]
        sys.modules["liger_kernel"] = None
        chunked_loss = importlib.import_module(ours.__name__)
        hidden, weight = torch.ones(2, 3, 2), torch.ones(5, 2)
        loss, _ = chunked_loss.LigerFusedLinearSimPOLoss()(weight, hidden, torch.ones(2, 3).long())
        assert loss.isfinite()
        absent = set()
        for name in chunked_loss.__all__:
            try:
                getattr(chunked_loss, name)
            except ImportError as e:
                assert name in str(e) and "pip install liger-kernel" in str(e)
                absent.add(name)
        assert absent == set(ours.__all__) - mine

    in_a_fork(check)


@pytest.mark.parametrize("name", CLASS)
def test_ignored_positions_cost_nothing_and_the_byte_budget_holds(name: str, monkeypatch: pytest.MonkeyPatch):
    """GEMMs run on live rows only, and no tensor as large as their logits is allocated."""
    tensors = _inputs(name, torch.float32, bias=False)
    for key in tensors:
        if "weight" in key:
            tensors[key] = torch.randn(20_000, WIDTH).requires_grad_(tensors[key].requires_grad)
    monkeypatch.setattr(chunked, "default_byte_budget", lambda device: 1 << 19)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as watched:
        _ours(name, {}, tensors)
    events = watched.events()
    products = [e.input_shapes[:2] for e in events if e.name in ("aten::mm", "aten::addmm")]
    sizes = {size for shapes in products for shape in shapes for size in shape if size < 1000}
    live = int((tensors["target"] != -100).sum())
    assert live < tensors["target"].numel() and sizes == {live, WIDTH}
    assert max(e.self_cpu_memory_usage for e in events) <= 1 << 20 < live * 20_000 * 4


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if "nll_target" not in case[1]], ids=str)
def test_no_host_synchronization(name: str, options: dict):
    """On fake tensors of a GPU whatever needs a value on the host raises, as a second target would. No gradients: a
    build of PyTorch without CUDA aborts on those."""
    tensors = _inputs(name, torch.float32)
    options = _options(options, tensors)
    with FakeTensorMode(), torch.no_grad():
        on_gpu = [
            {
                key: torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
                for key, x in values.items()
            }
            for values in (options, tensors)
        ]
        assert {x.device.type for x in _ours(name, *on_gpu)} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_on_a_gpu(name: str, options: dict):
    tensors = _inputs(name, torch.float32)
    options = _options(options, tensors)
    expected = _truth(name, options, tensors)
    on_gpu = [
        {
            key: x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for key, x in values.items()
        }
        for values in (options, tensors)
    ]
    for mine, true in zip(_ours(name, *on_gpu), expected, strict=True):
        assert (mine.cpu().double() - true).norm() <= 1e-5 * true.norm()


def _changed(name: str, change: dict):
    tensors = _inputs(name, torch.float32)
    return _ours(name, change, tensors | {key: value for key, value in change.items() if key in tensors})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dpo", {"loss_type": "ipo"}, "Unsupported loss_type: ipo"),
        ("dpo", {"loss_type": "exo_pair"}, "must be > 0"),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, r"\[0.0, 0.5\)"),
        ("dpo", {"ref_weight": None}, "needs ref_input and ref_weight"),
        ("dpo", {"ref_input": torch.zeros(5, TOKENS, WIDTH)}, "ref_input"),
        ("cpo", {"_input": torch.zeros(6, WIDTH)}, "do not match"),
        ("cpo", {"_input": torch.zeros(5, 2, WIDTH), "target": torch.zeros(5, 2).long()}, "5 sequences are not pairs"),
        ("orpo", {"nll_target": torch.zeros(3, TOKENS).long()}, "nll_target must be"),
        ("kto", {"preference_labels": None}, "preference_labels must be bool"),
        ("kto", {"preference_labels": torch.ones(6)}, "preference_labels must be bool"),
        ("kto", {"kl": torch.zeros(5)}, "kl must be"),
    ],
)
def test_what_does_not_fit_raises(name: str, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _changed(name, change)
