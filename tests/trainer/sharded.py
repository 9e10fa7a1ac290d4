"""Checks of the training engines on several ranks, in one job: main(ranks, folder, engine, checks).

`folder` holds models and tables (see test_engines.py). The job forks its ranks once everything is imported. Each runs
the named checks, functions of this file, one after another, with the recipe's section `engine`; a check that fails
leaves CHECK.failed in the folder with the traceback, one that passes CHECK.passed.
"""

import contextlib
import gc
import json
import os
import shutil
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sharded_run import SECTION, STAGES, Run, largest, table_of
from stagecalls import dpo, reference
from torch.utils._pytree import tree_leaves
from training import Log, recipe_of

from strop.trainer.errors import UserError
from strop.trainer.models.sequence import SlicedGroups
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table
from strop.trainer.run.world import World, join
from strop.trainer.training import buckets, deepspeed, fsdp, local, logprobs


def referred(table: Path, world: World, recipe, model: Path) -> None:
    """The stage reference on the rows of select-14."""
    if world.first:
        table.mkdir()
    world.barrier()
    stage = Stage("reference", table, world, Console(enabled=False), Log())
    reference(stage, recipe, select=model.parent / "select-14", model=model)


def equal(kind: str, world: World, folder: Path, engine: dict, name: str, dtype: str = "float32", prepare=None,
          **keys) -> Run:
    """Training on these ranks gives the weights that the local engine gives on them. sft_tied, and the local engine
    itself, are compared with one rank. prepare(engine): of the local engine."""
    model, loss = keys.get("model", "tied"), keys.get("loss", "")
    table = table_of(folder, model, dtype, loss)
    if kind == "dpo" and world.first and not table.exists():
        section = SECTION | {key: keys[key] for key in ("loss", "batch_size") if key in keys}
        referred(table, World(), recipe_of(dtype=dtype, dpo=section), folder / model)
    world.barrier()
    run = Run(kind, folder / f"{name}-all", world, engine, dtype=dtype, **keys)
    alone = engine["kind"] == "local" or name == "sft_tied" or "sequence_parallel" in engine
    if not alone or world.first:
        one = Run(kind, folder / f"{name}-one", World() if alone else world, {"kind": "local"}, dtype=dtype,
                  prepare=prepare, **keys)
        # in other microbatches bf16 rounds otherwise
        run.equals(one, dtype, 20 if alone and dtype == "bfloat16" else 1)
    world.barrier()
    return run


def sft_tied(world, folder, engine):
    run = equal("sft", world, folder, engine, "sft_tied", ema_decay=0.5)
    assert largest(folder / "sft_tied-one/ema", folder / "sft_tied-all/ema") < 1e-5
    assert run.stage.counts["rank_balance"] < 1 or run.engine.mesh.size == 1, "the ranks have different shares"
    assert world.size > 2 or "sequence_parallel" in engine or (
        run.stage.counts["microbatches"] > world.size * run.stage.counts["steps"])


def sft_bf16(world, folder, engine):
    equal("sft", world, folder, engine, "sft_bf16", "bfloat16", model="untied", activation_checkpointing=True)


def dpo_untied(world, folder, engine):
    run = equal("dpo", world, folder, engine, "dpo_untied", model="untied", activation_checkpointing=True)
    assert abs(run.log.rows[0]["loss"] - 0.6931472) < 1e-6


def dpo_bf16(world, folder, engine):
    equal("dpo", world, folder, engine, "dpo_bf16", "bfloat16")


class Passed(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def hooked(engine) -> None:
    """Puts the identity around each module, as ZeRO 3's hooks are: in bf16 autograd then adds up the gradients of what
    several modules read (a base layer, its adapter) in the same order."""
    def hook(_, inputs):
        return tuple(Passed.apply(x) if torch.is_tensor(x) and x.requires_grad else x for x in inputs)

    for module in engine.model.modules():
        module.register_forward_pre_hook(hook)


def lora_fp32(world, folder, engine):
    equal("sft", world, folder, engine, "lora_fp32", lora={"rank": 4})


def lora_bf16(world, folder, engine):
    prepare = hooked if engine.get("zero_stage") == 3 else None
    equal("sft", world, folder, engine, "lora_bf16", "bfloat16", prepare=prepare, lora={"rank": 4})
    assert largest(folder / "lora_bf16-one/model", folder / "lora_bf16-all/model") < 2e-2
    names = [set(load_file(folder / f"lora_bf16-{n}/model/adapter/adapter_model.safetensors")) for n in ("one", "all")]
    assert names[0] == names[1] and names[0]
    one, all_ = (read_json(folder / f"lora_bf16-{n}/model/config.json") for n in ("one", "all"))
    assert one == all_


def reward_model(world, folder, engine):
    equal("reward", world, folder, engine, "reward", held_out=0.3, batch_size=3)
    one, all_ = (read_json(folder / f"reward-{n}/reward.json") for n in ("one", "all"))
    assert one["all"].keys() == all_["all"].keys() and one["all"]["accuracy"] == all_["all"]["accuracy"]


def sliced(world, folder, engine):
    """All ranks share every row: what one rank gives, by the local engine and by FSDP, with the reference's table of
    all ranks, and no module sees more tokens than this rank's slice."""
    seen, real = [], logprobs.hidden_states

    def watched(body, groups):
        if not isinstance(groups, SlicedGroups):
            return real(body, groups)
        most = -(-groups.num_tokens // world.size)

        def note(module, inputs, output):
            for x in tree_leaves(output if torch.is_tensor(output) else tuple(output)):
                assert not torch.is_tensor(x) or x.dim() < 3 or x.shape[1] == most, (type(module), x.shape, most)

        hook = torch.nn.modules.module.register_module_forward_hook(note)
        seen.append(groups.num_tokens)
        try:
            return real(body, groups)
        finally:
            hook.remove()

    shared, logprobs.hidden_states = {"sequence_parallel": world.size}, watched
    equal("sft", world, folder, {"kind": "local"} | shared, "sliced-local")
    # with a large eps AdamW does not blow up the rounding of the smallest gradients
    keys = {"model": "untied", "activation_checkpointing": True, "activation_offload": True, "eps": 1e-4}
    run = equal("dpo", world, folder, {"kind": "fsdp"} | shared, "sliced-fsdp", **keys)
    assert run.stage.counts["rank_balance"] == 1 and any(n % world.size for n in seen) and max(seen) >= 40, seen
    table = folder / "sliced-reference"
    if world.first:
        table.mkdir()
    world.barrier()
    recipe = recipe_of(dpo=SECTION, engine={"kind": "local"} | shared)
    reference(Stage("reference", table, world, Console(enabled=False), Log()), recipe, select=folder / "select-14",
              model=folder / "untied")
    logprobs.hidden_states = real
    if world.first:
        one, all_ = (read_table(t / "reference.parquet").to_pylist()
                     for t in (table_of(folder, "untied", "float32", ""), table))
        for a, b in zip(one, all_, strict=True):
            assert a["row_id"] == b["row_id"] and a["fingerprint"] == b["fingerprint"]
            for mine, theirs in zip(a["logps"], b["logps"], strict=True):
                assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=0)


def labels(world, folder, engine):
    """KTO: its baseline is a pass of its own over a step, and the reference's table has mismatched completions."""
    found = []
    for name, ranks, how in (("all", world, engine), ("one", World(), {"kind": "local"})):
        if ranks.size > 1 or world.first:
            recipe = recipe_of(engine=how, dpo=SECTION | {"loss": "kto", "eval_steps": 0, "max_tokens": 96})
            stages = [Stage(part, folder / f"kto-{name}-{part}", ranks, Console(enabled=False), Log())
                      for part in ("reference", "dpo")]
            for stage in stages if world.first else ():
                stage.dir.mkdir()
            ranks.barrier()
            reference(stages[0], recipe, select=folder / "select-rated", model=folder / "tied")
            ranks.barrier()
            dpo(stages[1], recipe, select=folder / "select-rated", policy=folder / "tied", reference=stages[0].dir,
                same_weights=True)
            found.append(stages[1].metrics.rows)
    world.barrier()
    if world.first:
        assert largest(folder / "kto-all-dpo/model", folder / "kto-one-dpo/model") < 1e-5
        for all_, one in zip(*found, strict=True):
            for key in ("loss", "kl", "grad_norm", "rewards/chosen"):
                assert abs(all_[key] - one[key]) <= 1e-4 * (1 + abs(one[key])), (key, all_, one)


def one_row_a_step(world, folder, engine):
    """All ranks but one have nothing in every step."""
    equal("sft", world, folder, engine, "one_row", rows=6, batch_size=1)


def bema_of_dpo(world, folder, engine):
    equal("dpo", world, folder, engine, "bema", bema=True, snapshots=1)
    assert largest(folder / "bema-one/ema", folder / "bema-all/ema") < 1e-5
    (one,), (all_,) = (sorted((folder / f"bema-{n}/snapshots").iterdir()) for n in ("one", "all"))
    assert largest(one, all_) < 1e-5 and one.name == all_.name


def unpaired(world, folder, engine):
    """KTO and BCO also make passes without gradients, of other rows; in the last step most ranks have none."""
    for loss in ("kto", "bco", "listwise"):
        run = equal("dpo", world, folder, engine, loss, loss=loss, batch_size=5 if loss == "listwise" else 9)
        assert loss == "listwise" or any(row["kl" if loss == "kto" else "delta"] for row in run.log.rows)


def reference_table(world, folder, engine):
    """The log-probs of a reference that is sharded, with engine.kind=fsdp, are those of a whole one."""
    made = []
    for name, ranks, kind in (("all", world, engine), ("one", World(), {"kind": "local"})):
        table = folder / f"frozen-{name}"
        if name == "all" or world.first:
            referred(table, ranks, recipe_of(dpo=SECTION, engine=kind, dtype="float32"), folder / "untied")
        world.barrier()
        made.append(read_table(table / "reference.parquet").to_pylist())
    assert len(made[0]) == 14
    for one, two in zip(*made, strict=True):
        assert one["row_id"] == two["row_id"] and one["fingerprint"] == two["fingerprint"]
        for a, b in zip(one["logps"], two["logps"], strict=True):
            assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def guarded(world, folder, engine):
    """The checks of completions find what they find on one rank, and change nothing."""
    run = equal("sft", world, folder, engine, "guarded", prompts="prompts", eval_steps=1, eval_prompts=3)
    assert run.log.rows[-1]["eval/stopped"] == 0
    one, all_ = (read_json(folder / f"guarded-{n}/guard.json")["checks"] for n in ("one", "all"))
    assert len(one) == len(all_) > 2
    for a, b in zip(one, all_, strict=True):
        assert a["cut_share"] == b["cut_share"] and a["mean_length"] == b["mean_length"]
        assert abs(a["kl"] - b["kl"]) < 1e-4 * (1 + a["kl"]), (a, b)


def resumed(world, folder, engine):
    """Killed and resumed on the same ranks: the same bits. Resumed by a local engine: the same but for rounding."""
    resumes(world, folder, engine, "", 1e-5)


def resumed_int8(world, folder, engine):
    """The same with 8-bit moments, where other last bits of a gradient can give other codes."""
    resumes(world, folder, engine, "8", 1e-3, moments="int8", model="untied")


def resumes(world, folder, engine, name, allowed, **keys):
    keys |= {"checkpoint_steps": 1, "ema_decay": 0.5, "snapshots": 1, "read": False}
    whole, killed, elsewhere = (folder / f"{part}{name}" for part in ("whole", "killed", "elsewhere"))
    Run("sft", whole, world, engine, **keys)
    with contextlib.suppress(KeyboardInterrupt):
        Run("sft", killed, world, engine, log=Log(stop_at=3), **keys)
        raise AssertionError("was not killed")
    if world.first:
        shutil.copytree(killed, elsewhere)
    world.barrier()
    run = Run("sft", killed, world, engine, **keys)
    assert run.log.rewound_to == 2
    world.barrier()  # a local engine saves on the first rank
    for part in ("model", "ema"):
        assert largest(whole / part, killed / part) == 0.0
    if world.first:
        other = Run("sft", elsewhere, World(), {"kind": "local"}, **keys)
        assert other.log.rewound_to == 2
        assert largest(whole / "model", elsewhere / "model") < allowed
    world.barrier()


def smaller_moments(world, folder, engine):
    """Blocks of codes and random numbers are those of the local engine, whatever the cut."""
    for moments in ("bfloat16", "int8"):
        run, one = (Run("sft", folder / f"{moments}-{kind}", world, one, model="untied", moments=moments)
                    for kind, one in (("all", engine), ("one", {"kind": "local"})))
        run.equals(one, "float32", 50)
def freed(world, folder, engine):
    """A stage leaves no weights and no state in memory; of stage 3 some modules stay, with a few constants each."""
    held = []
    for i in range(3):
        run = Run("sft", folder / f"freed-{i}", world, engine, ema_decay=0.5, read=False)
        del run
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
    assert held[2] < held[1] + 1000, held  # bytes; the weights alone are 100 times as many


def damaged(world, folder, engine):
    """A damaged part of a resume point is one line on every rank."""
    with contextlib.suppress(KeyboardInterrupt):
        Run("sft", folder / "damaged", world, engine, log=Log(stop_at=2), checkpoint_steps=1, read=False)
    if world.first:
        parts = sorted((folder / "damaged" / "work" / "step-000001").glob("*.safetensors"))
        assert len(parts) == world.size
        with open(parts[-1], "r+b") as f:
            f.seek(-8, os.SEEK_END)
            f.write(b"damaged.")
    world.barrier()
    try:
        Run("sft", folder / "damaged", world, engine, checkpoint_steps=1, read=False)
    except UserError as e:
        assert "work/step-000001/state-" in str(e) and "damaged" in str(e)
    else:
        raise AssertionError("was read")


def full_disk(world, folder, engine):
    """A rank that cannot write its part ends the run on every rank, in one line, and the last point stays."""
    from strop.trainer.training import checkpoint

    real, count = checkpoint.save_file, []

    def save(*args):
        count.append(1)
        if world.rank == world.size - 1 and len(count) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    checkpoint.save_file = save
    try:
        Run("sft", folder / "full", world, engine, checkpoint_steps=1, read=False)
    except UserError as e:
        assert "work/step-000002: cannot be written (No space left on device)" in str(e)
    else:
        raise AssertionError("was written")
    finally:
        checkpoint.save_file = real
    world.barrier()
    assert [p.name for p in (folder / "full/work").iterdir()] == ["step-000001"]


def overlaps(world, folder, engine):
    """Local: buckets leave while the last backward pass runs; the bits are those of one reduction a tensor after it."""
    size, sent = buckets.BYTES, []

    def noted(training, loss, last):
        backward(training, loss, last)
        if last:
            sent.append((len(training.buckets.works), len(training.buckets.flat)))

    def one_by_one(self):
        for tensor in self.sums:
            dist.all_reduce(tensor, group=self.group)
        self.reset()

    backward, complete, finish = local.Engine.backward, buckets.Buckets.complete, buckets.Buckets.finish
    for dtype in ("float32", "bfloat16"):
        buckets.BYTES, local.Engine.backward = 1 << 13, noted
        many = Run("sft", folder / f"many-{dtype}", world, engine, dtype=dtype)
        buckets.BYTES, local.Engine.backward = size, backward
        one = Run("sft", folder / f"one-{dtype}", world, engine, dtype=dtype)
        buckets.Buckets.complete, buckets.Buckets.finish = lambda self, i: None, one_by_one
        plain = Run("sft", folder / f"plain-{dtype}", world, engine, dtype=dtype)
        buckets.Buckets.complete, buckets.Buckets.finish = complete, finish
        assert len(one.engine.buckets.flat) == 1 and sent and all(2 < flat == works for works, flat in sent), sent
        for name, value in plain.masters.items():
            # more than two ranks add up in another order
            same = torch.equal if world.size == 2 else torch.allclose
            assert same(many.masters[name], value) and same(one.masters[name], value), name
        assert all(row["wait/ranks_max"] >= row["wait/ranks"] > 0 for row in many.log.rows)
        assert all(row["wait/data_max"] >= row["wait/data"] >= 0 for row in many.log.rows)


def waits(world, folder, engine):
    """A rank that comes late to a step: the others wait for it, and the metrics say how long."""
    def slow(training, loss, last):
        if world.rank and training.step_index == 1 and last:
            time.sleep(0.5)
        return backward(training, loss, last)

    kind = {"local": local, "fsdp": fsdp, "deepspeed": deepspeed}[engine["kind"]].Engine
    backward, kind.backward = kind.backward, slow
    try:
        rows = Run("sft", folder / "waits", world, engine, read=False).log.rows
    finally:
        kind.backward = backward
    assert rows[1]["wait/ranks_max"] > 0.4 and all(row["wait/ranks_max"] >= row["wait/ranks"] > 0 for row in rows), rows


def times_out(world, folder, engine):
    """A rank that does not come: one clear line on the others. It comes last, since the groups are of no use then."""
    engine = engine | {"timeout": 4}
    section = STAGES["sft"][1]
    train = section.train

    def late(stage, engine, *args, **options):
        backward = engine.backward

        def slow(loss, last):  # not in step: buckets leave before it
            if world.rank and engine.step_index == 1:
                time.sleep(7)
            return backward(loss, last)

        engine.backward = slow
        return train(stage, engine, *args, **options)

    section.train = late
    try:
        Run("sft", folder / "late", world, engine, read=False)
    except UserError as e:
        assert "round-00/sft: step 2: rank" in str(e) and "engine.timeout=4 s" in str(e), e
    except RuntimeError:
        assert world.rank, "the first rank should say so"
    else:
        raise AssertionError("did not time out")
    finally:
        section.train = train


def rank_of(folder: Path, engine: dict, checks: list[str]) -> None:
    world, deepspeed.WHOLE = join("cpu", 1), 100  # of our small weights, stage 3 divides all but the norms
    for check in checks:
        started = time.perf_counter()
        try:
            globals()[check](world, folder, engine)
        except BaseException:
            with open(folder / f"{check}.failed", "a") as f:
                f.write(f"rank {world.rank}\n{traceback.format_exc()}")
            sys.stdout.flush()
            os._exit(1)  # the others would wait
        if world.first:
            print(f"{check}: {time.perf_counter() - started:.1f} s", flush=True)
            (folder / f"{check}.passed").touch()


def main(ranks: int, folder: Path, engine: dict, checks: list[str]) -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            rank_of(folder, engine, checks)
            os._exit(0)
        children.append(pid)
    worst = 0
    for _ in children:
        _, status = os.wait()
        if status and not worst:
            time.sleep(1)
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        worst = worst or status
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]))
