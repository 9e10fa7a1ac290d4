"""csrc/ without a GPU: the CUDA operators on CPU tensors with the kernels' arithmetic, their machine code, and the
build. The same cases run on a GPU if the library was built."""

import math
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.kernels import Group, PackedGroups, _cpu
from strop.kernels.attention import reference as attention_reference
from strop.kernels.attention.cpu import _tables
from strop.kernels.head import cuda, passes, reference

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _setup() -> dict:
    pytest.importorskip("setuptools")
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> str:
    """The device of torch.ops.strop_host, csrc/ops.cpp and row.h for CPU tensors. A 16-byte access that is not aligned
    traps."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    library, torch_folder = tmp_path_factory.mktemp("csrc") / "host.so", Path(torch.__file__).parent
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    command += ["-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{torch_folder / 'include'}"]
    command += [str(Path(__file__).with_name("csrc_host.cpp")), f"-L{torch_folder / 'lib'}", "-ltorch"]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=120)
    torch.ops.load_library(library)
    return "cpu"


@pytest.fixture(scope="module", params=["host", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def device(request) -> str:
    if request.param == "host":
        return request.getfixturevalue("host")
    if not cuda.load():
        pytest.skip("csrc was not built")
    return "cuda"


def _forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        return cuda.gather_forward(logits, target)
    logp, sums = torch.full(logits.shape[:1], 7.0), torch.full((len(logits), 2), 7.0)
    torch.ops.strop_host.cuda_gather_forward(logits, target, logp, sums)
    return logp, sums


def _backward(grad: Tensor, logits: Tensor, target: Tensor, logp: Tensor, sums: Tensor, out: Tensor) -> None:
    if logits.is_cuda:
        return cuda.gather_backward(grad, logits, target, torch.expm1(logp), sums, out)
    torch.ops.strop_host.cuda_gather_backward(grad, logits, target, torch.expm1(logp), sums, out)


def _matrix(rows: int, columns: int, gap: int, offset: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A matrix with `gap` elements between rows, `offset` elements from a 16-byte boundary, and all its storage. What
    lies outside is NaN: it would show in a sum, and an element written over it is seen."""
    stride = columns + gap
    storage = torch.full((offset + rows * stride + 16,), math.nan, dtype=dtype, device=device)
    return storage.as_strided((rows, columns), (stride, 1), offset), storage


def _outside(matrix: Tensor, storage: Tensor) -> Tensor:
    inside = torch.zeros(storage.shape, dtype=torch.bool, device=storage.device)
    inside.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())[:] = True
    return storage[~inside]


def _norms(values: list[Tensor], truths: list[Tensor]) -> list[float]:
    return [(a.double() - b.double()).norm().item() for a, b in zip(values, truths, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gap", "offset", "out_gap", "out_offset"),
    [(0, 0, 0, 0), (0, 3, 0, 3), (5, 1, 5, 1), (0, 1, 0, 0), (1, 0, 0, 0)],
    ids=["dense", "shifted", "gaps", "shifted apart", "gaps apart"],
)
def test_every_split_of_a_row(device: str, dtype: torch.dtype, gap: int, offset: int, out_gap: int, out_offset: int):
    """Heads, packs and tails of every length, rows shorter than a head, several rounds of loads; out of place and in
    place; an ignored row and one of zero gradient, which are not read."""
    torch.manual_seed(0)
    for columns in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 255, 1000, 2049, 4103, 9001):
        logits, storage = _matrix(4, columns, gap, offset, dtype, device)
        logits.copy_(torch.randn(4, columns) * 4)
        logits[2] = math.nan
        target = torch.tensor([0, columns - 1, -1, columns // 2], device=device)
        grad = torch.tensor([1.0, -0.5, 1.0, 0.0], device=device)
        live = torch.tensor([0, 1, 3], device=device)
        logp, sums = _forward(logits, target)
        expected = [x[live] for x in passes.gather_forward(logits.float(), target)]
        torch.testing.assert_close([logp[live], sums[live]], expected)
        assert logp[2] == 0 and (logp <= 0).all()
        out, out_storage = _matrix(4, columns, out_gap, out_offset, dtype, device)
        _backward(grad, logits, target, logp, sums, out)
        expected = torch.empty_like(out)
        passes.gather_backward(grad, logits, target, torch.expm1(logp), sums, expected)
        torch.testing.assert_close(out, expected)
        assert (out[2:] == 0).all()
        logits[3] = math.nan
        _backward(grad, logits, target, logp, sums, logits)
        torch.testing.assert_close(logits, expected)
        assert _outside(logits, storage).isnan().all() and _outside(out, out_storage).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "shift"), [(2, 0), (3001, 0), (3001, 50), (49152, 0), (151936, 0), (151936, 20)])
def test_error_is_at_most_twice_that_of_plain_pytorch(device: str, dtype: torch.dtype, columns: int, shift: int):
    """Also where the log-sum-exp is so large that rounding it would show in every gradient."""
    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(4, columns, generator=generator) * 3 + shift).to(device, dtype).requires_grad_()
    target = torch.randint(0, columns, (4,), generator=generator).to(device)
    upstream = torch.randn(4, generator=generator).to(device)
    high = logits.detach().double().requires_grad_()
    truth = reference.gather_logprob(high, target)
    truths = [truth, torch.autograd.grad(truth, high, upstream.double())[0]]
    plain = reference.gather_logprob(logits.float(), target)
    plain = [plain, torch.autograd.grad(plain, logits, upstream)[0]]
    logits = logits.detach()
    logp, sums = _forward(logits, target)
    out = torch.empty_like(logits)
    _backward(upstream, logits, target, logp, sums, out)
    for mine, theirs in zip(_norms([logp, out], truths), _norms(plain, truths), strict=True):
        assert mine <= 2 * theirs


@pytest.mark.parametrize("kind", ["huge", "equal", "-inf", "all -inf", "target -inf", "inf", "nan", "largest"])
def test_extreme_logits(device: str, kind: str):
    logits = torch.randn(2, 5000)
    if kind == "huge":
        logits[:, 5], logits[:, 4500] = 1e4, -1e4
    elif kind == "equal":
        logits[:] = 1.0
    elif kind == "-inf":
        logits[:, :4200] = -math.inf
    elif kind == "all -inf":
        logits[1] = -math.inf
    elif kind == "target -inf":
        logits[0, 4500] = -math.inf
    elif kind == "largest":
        logits[0, 3], logits[1, 4700] = 3e38, -3e38
    else:
        logits[1, 9] = float(kind)
    target = torch.tensor([4500, 4700])
    expected = reference.gather_logprob(logits, target)
    gradient = torch.empty_like(logits)
    logits, target, grad = logits.to(device), target.to(device), torch.ones(2, device=device)
    logp, sums = _forward(logits, target)
    torch.testing.assert_close(logp.cpu(), expected, equal_nan=True)
    assert not (logp > 0).any()
    passes.gather_backward(grad.cpu(), logits.cpu(), target.cpu(), torch.expm1(logp).cpu(), sums.cpu(), gradient)
    _backward(grad, logits, target, logp, sums, logits)
    torch.testing.assert_close(logits.cpu(), gradient, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(columns=st.integers(1, 700), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]), seed=st.integers(0, 99))
def test_logp_is_never_above_0(host: str, columns: int, scale: float, seed: int):
    """Of the most probable token, where log-prob and rounding meet."""
    logits = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * scale
    target = logits.argmax(1)
    logp, sums = _forward(logits, target)
    assert (logp <= 0).all()
    torch.testing.assert_close((logp, sums), passes.gather_forward(logits, target), rtol=1e-5, atol=1e-5)


def test_a_target_beyond_the_vocabulary_gives_nan(device: str):
    logits, target = torch.randn(3, 30, device=device), torch.tensor([30, 1 << 40, 2], device=device)
    logp, _ = _forward(logits, target)
    assert logp.isnan().tolist() == [True, True, False]


def test_offsets_pass_two_to_the_31(device: str):
    """Row 3 of a view with 2^30 elements between rows lies beyond 2^31; only the rows' own pages are touched."""
    stride, columns = 1 << 30, 70
    storage = torch.empty(3 * stride + columns, dtype=torch.float16, device=device)
    logits = storage.as_strided((4, columns), (stride, 1))
    logits.copy_(torch.randn(4, columns))
    target, grad = torch.tensor([1, 2, 3, 69], device=device), torch.ones(4, device=device)
    logp, sums = _forward(logits, target)
    torch.testing.assert_close((logp, sums), passes.gather_forward(logits, target))
    expected = torch.empty(4, columns, dtype=torch.float16, device=device)
    passes.gather_backward(grad, logits, target, torch.expm1(logp), sums, expected)
    _backward(grad, logits, target, logp, sums, logits)
    torch.testing.assert_close(logits.clone(), expected)


def test_no_rows(device: str):
    logits, target = torch.empty(0, 30, device=device), torch.empty(0, dtype=torch.int64, device=device)
    logp, sums = _forward(logits, target)
    assert logp.shape == (0,) and sums.shape == (0, 2)
    _backward(torch.empty(0, device=device), logits, target, logp, sums, torch.empty_like(logits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, "bf16, fp16 or fp32"),
        ({"logits": torch.zeros(8, 3).t()}, "side by side"),
        ({"logits": torch.zeros(24)}, "a matrix"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "int64"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "one value a row"),
        ({"logp": torch.zeros(3, dtype=torch.float64)}, "fp32"),
        ({"sums": torch.zeros(6, 2)[::2]}, "of sums two"),
        ({"sums": torch.zeros(3)}, "of sums two"),
    ],
)
def test_what_does_not_fit_raises(host: str, change: dict, message: str):
    arguments = {"logits": torch.zeros(3, 8), "target": torch.zeros(3, dtype=torch.int64)}
    arguments |= {"logp": torch.zeros(3), "sums": torch.zeros(3, 2)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.strop_host.cuda_gather_forward(*(arguments | change).values())


@pytest.mark.parametrize("out", [torch.zeros(3, 9), torch.zeros(3, 8, dtype=torch.float16), torch.zeros(8, 3).t()])
def test_an_out_that_does_not_fit_raises(host: str, out: Tensor):
    row, target = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"as logits|side by side"):
        torch.ops.strop_host.cuda_gather_backward(row, torch.zeros(3, 8), target, row, row, out)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_in_gather_logprob(dtype: torch.dtype, monkeypatch):
    """Through the public function, against Triton's kernels; deterministic."""
    from strop.kernels import gather_logprob

    if not cuda.load():
        pytest.skip("csrc was not built")
    logits = (torch.randn(64, 50257, device="cuda") * 3).to(dtype).requires_grad_()
    target = torch.randint(0, 50257, (64,), device="cuda")
    target[5] = -100
    results = []
    for prefer in (True, True, False):
        monkeypatch.setattr(cuda, "prefer", prefer)
        logp = gather_logprob(logits, target)
        results.append([logp, *torch.autograd.grad(logp, logits, torch.linspace(-1, 1, 64, device="cuda"))])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    torch.testing.assert_close(results[0], results[2])


def test_the_library_is_taken_only_where_it_is_measured_to_be_faster(monkeypatch):
    class Logits:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cuda, "load", lambda: True)
    assert not cuda.takes("gather_forward", torch.zeros(1))
    assert not cuda.takes("gather_forward", Logits()), "not yet measured"
    monkeypatch.setattr(cuda, "FASTER", {(9, 0): {"gather_forward"}, (8, 0): {"gather_backward"}})
    assert cuda.takes("gather_forward", Logits()) and not cuda.takes("gather_backward", Logits())
    monkeypatch.setattr(cuda, "prefer", False)
    assert not cuda.takes("gather_forward", Logits())
    monkeypatch.setattr(cuda, "prefer", True)
    assert cuda.takes("gather_backward", Logits())
    monkeypatch.setattr(cuda, "load", lambda: False)
    with pytest.raises(RuntimeError, match="STROP_BUILD_CSRC=1"):
        cuda.takes("gather_forward", Logits())
    monkeypatch.setattr(cuda, "prefer", None)
    assert not cuda.takes("gather_forward", Logits()), "not built"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    setup = _setup()
    if not setup["find_nvcc"]():
        pytest.skip("no nvcc")
    built = tmp_path_factory.mktemp("csrc") / "_csrc.so"
    setup["compile_csrc"](built)
    return built


def test_machine_code(library: Path):
    """Every kernel for every architecture, with 16-byte loads and stores, without spills."""
    pytest.importorskip("triton")
    from benchmarks import sass

    rows = sass.inspect(library)
    assert len(rows) == 18
    assert [row for row in rows if row.failures] == []
    assert {row.target for row in rows} == {"sm_80", "sm_90a", "sm_100a"}


def test_inspection_fails_where_it_must():
    pytest.importorskip("triton")
    from benchmarks import sass

    usage = "REG:40 STACK:0 SHARED:64 LOCAL:0"
    load, store = "LDG.E.128 R4, desc[UR4][R2.64] ;\n", "@!P0 STG.E.128 desc[UR4][R2.64], R4 ;\n"
    good = sass.judge("backward bf16", "sm_90a", usage, load * 4 + store * 4)
    assert good.failures == () and good.wide_accesses == 8 and good.registers == 40
    for name, code, message in (
        ("forward bf16", load * 4 + "STL [R1], R2 ;", "spill"),
        ("forward bf16", load * 3 + "LDG.E.64 R4, desc[UR4][R2.64] ;", "16-byte loads"),
        ("backward bf16", load * 4, "16-byte stores"),
        ("forward bf16", load * 4 + "LDG.E.U8 R4, desc[UR4][R2.64] ;", "single bytes"),
    ):
        (failure,) = sass.judge(name, "sm_90a", usage, code).failures
        assert message in failure


def test_operators_are_registered(library: Path, tmp_path: Path):
    """The library itself, loaded into a PyTorch without CUDA, with a stub for the one missing symbol."""
    stand_in = tmp_path / "stand_in.so"
    code = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 0; }"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(stand_in)]
    subprocess.run(command, input=code, text=True, check=True, timeout=60)
    code = f"""
import ctypes, torch
ctypes.CDLL({str(stand_in)!r}, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for op in (torch.ops.strop.cuda_gather_forward.default, torch.ops.strop.cuda_gather_backward.default):
    print(op._schema, torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    forward, backward = done.stdout.splitlines()
    assert forward.startswith("strop::cuda_gather_forward(Tensor logits,") and forward.endswith("-> () True")
    assert backward.startswith("strop::cuda_gather_backward(Tensor grad,") and backward.endswith("-> () True")


X86 = platform.machine() == "x86_64"
CPU = [f"_cpu_{name}" for name in (("avx2", "avx512", "avx512_bf16") if X86 else ("default",))]


@pytest.mark.parametrize(
    ("wish", "of_nvcc", "of_torch", "compiler", "built"),
    [
        ("", "13", "13", True, [*CPU, "_csrc"]),
        ("", "13", "12", True, CPU),
        ("", "13", None, True, CPU),
        ("", None, "13", True, CPU),
        ("", None, "13", False, []),
        ("0", "13", "13", True, []),
        ("1", "13", None, True, [*CPU, "_csrc"]),
        ("1", None, "13", True, "no nvcc"),
        ("1", "13", "13", False, "no C\\+\\+ compiler"),
        ("2", "13", "13", True, "must be 0 or 1"),
    ],
)
def test_what_setup_builds(monkeypatch, wish, of_nvcc, of_torch, compiler, built):
    setup = _setup()
    extensions = setup["extensions"]
    monkeypatch.setenv("STROP_BUILD_CSRC", wish)
    for name, found in (("find_nvcc", of_nvcc and "nvcc"), ("find_compiler", compiler and "g++"), ("find_torch", ROOT)):
        monkeypatch.setitem(extensions.__globals__, name, lambda found=found: found or None)
    monkeypatch.setitem(extensions.__globals__, "cuda_major", lambda *_: (of_nvcc, of_torch))
    if isinstance(built, str):
        with pytest.raises(SystemExit, match=built):
            extensions()
        return
    assert [(x.name, x.optional) for x in extensions()] == [(f"strop.kernels.{name}", wish == "") for name in built]


@pytest.mark.parametrize("name", CPU)
def test_every_set_of_instructions_compiles_and_has_all_operators(name: str, tmp_path: Path):
    """What the install compiled, or is compiled now if it did not, loaded in a process of its own; called only where
    this processor can do what it says."""
    setup, library = _setup(), Path(_cpu.__file__).with_name(f"{name}.so")
    if not setup["find_compiler"]():
        pytest.skip("no C++ compiler")
    if not library.exists():
        library = tmp_path / library.name
        setup["compile_cpu"](name.removeprefix("_cpu_"), library)
    can = {
        "_cpu_default": True,
        "_cpu_avx2": torch.cpu._is_avx2_supported(),
        "_cpu_avx512": torch.cpu._is_avx512_supported(),
        "_cpu_avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    groups = [Group([1] * 150, [[2] * 61, [3] * 9]), Group([], [[1]]), Group([1] * 3, [[2] * 64] * 3)]
    groups = PackedGroups.pack(groups)
    torch.manual_seed(0)
    rows = [torch.randn(n, groups.num_tokens, 48).bfloat16() for n in (4, 4, 2, 2)]  # upstream, q, k, v
    tables = _tables(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    places = torch.tensor([(0, 5, -1), (1, 33, 31), (0, 6, -1), (1, 33, 2)]).T.contiguous()
    shapes = [(2, 2, 40, 48)] * 2 + [(4 * 2 * 32, 48)] * 2
    cache = [torch.randn(shape).bfloat16() for shape in shapes]
    cached = [*(x[:, :4] for x in rows[1:]), *cache, torch.tensor([[0, 32]]), *places]
    torch.save((rows, tuple(tables), cached), tmp_path / "inputs.pt")
    bounds = {torch.bfloat16: 0.005} | ({} if name.endswith("bf16") else {torch.float32: 1e-6})
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
assert all(hasattr(torch.ops.strop, "cpu_" + name) for name in {_cpu.OPERATORS})
x, out = torch.randn(1000), torch.empty(1000)
if {can[name]}:
    torch.ops.strop.cpu_silu_mul(x, x, out)
    torch.testing.assert_close(out, torch.nn.functional.silu(x) * x)
    (grad, q, k, v), (segments, blocks, slices, share_rows), cached = torch.load("inputs.pt")
    tables, results = (segments, blocks, slices), []
    for dtype in {list(bounds)}:
        grad, q, k, v = (x.to(dtype) for x in (grad, q, k, v))
        out, grads = torch.empty_like(q), [torch.empty_like(x) for x in (q, k, v)]
        lse = torch.empty(q.shape[:2], dtype=torch.float64 if dtype == torch.float32 else torch.float32)
        torch.ops.strop.cpu_prefix_attention(q, k, v, segments, blocks, 0.2, out, lse)
        shares = torch.empty(2, 2, share_rows, 48)
        torch.ops.strop.cpu_prefix_attention_backward(grad, q, k, v, out, lse, *tables, 0.2, shares, *grads)
        attended = torch.empty(4, 4, 48, dtype=dtype)
        own = [x.to(dtype, copy=True) if x.is_floating_point() else x for x in cached]
        torch.ops.strop.cpu_cached_attention(*own, 0.2, 0.0, 1000, attended)
        results.append([out[None], *(x[None] for x in grads), attended])
    torch.save(results, "results.pt")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if can[name]:
        qkv = [x[None].double().requires_grad_() for x in rows[1:]]
        truth = attention_reference.prefix_attention(*qkv, groups, scale=0.2)
        truths = [truth, *torch.autograd.grad(truth, qkv, rows[0][None].double())]
        exact = [x.double() if x.is_floating_point() else x for x in cached]
        truths.append(attention_reference.attention_over_cache(*exact, scale=0.2))
        for results, bound in zip(torch.load(tmp_path / "results.pt"), bounds.values(), strict=True):
            for found, expected in zip(results, truths, strict=True):
                assert (found.double() - expected).norm() <= bound * expected.norm()


def test_a_compiler_that_fails_says_what_it_said(tmp_path: Path, monkeypatch):
    setup = _setup()
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(setup["CompileError"], match="error: no such thing"):
        setup["compile_cpu"](CPU[0].removeprefix("_cpu_"), tmp_path / "out.so")


def test_setup_reads_the_cuda_of_nvcc_and_of_torch(tmp_path: Path):
    setup = _setup()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    for line, expected in (("cuda: Optional[str] = '13.0'", "13"), ("cuda: Optional[str] = None", None)):
        (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\nhip: Optional[str] = '6.4'\n")
        assert setup["cuda_major"](str(nvcc), tmp_path) == ("12", expected)
    assert setup["find_torch"]() == Path(torch.__file__).parent
