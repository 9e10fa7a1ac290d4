"""Copies of the run directory on nodes that share no storage: two ranks in processes of their own, each as a node."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from forked import in_a_fork

from strop.trainer.errors import UserError
from strop.trainer.methods.running import _check_recipes
from strop.trainer.run import mirror
from strop.trainer.run.artifacts import external
from strop.trainer.run.console import Console
from strop.trainer.run.store import Store
from strop.trainer.run.world import World
from strop.trainer.sampling.asking import Pool


def on_two_nodes(tmp_path, check, folders=("a", "b")):
    """check(world, run_dir) on two ranks, in the working directories `folders`."""
    def node(rank):
        def start():
            signal.alarm(60)  # ends a process that waits for the other one, which failed
            folder = tmp_path / folders[rank]
            folder.mkdir(exist_ok=True)
            os.chdir(folder)
            os.environ |= {"LOCAL_RANK": "0", "RANK": str(rank)}
            mirror.PATIENCE = 0.3
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
            check(World(rank, 2), Path("runs/tiny"))
            dist.barrier()
        in_a_fork(start)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(node, range(2)))


def write(folder, age=0, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, ns=(10**18 - age, 10**18 - age))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".")}


def test_shared_storage_makes_no_group_and_copies_nothing(tmp_path):
    def check(world, run_dir):
        assert mirror.begin(world, run_dir) == [] and not mirror.is_on()
        assert mirror.keeps(world) == world.first
        assert mirror.on_nodes(world, lambda: world.rank) == 0
        folder = Path(f"only-{world.rank}")
        write(folder, x="1")
        mirror.spread(folder)
        mirror.meet(folder)
        world.barrier()
        assert contents(folder) == {"x": "1"} and not list(run_dir.iterdir())

    on_two_nodes(tmp_path, check, ("a", "a"))


def test_nodes_exchange_files(tmp_path):
    def check(world, run_dir):
        host = os.uname().nodename
        assert mirror.begin(world, run_dir) == [host] and mirror.is_on() and mirror.keeps(world)
        first = world.first
        folder = run_dir / "x.partial"
        if first:
            write(folder, shard0_parquet="zero", work__log_jsonl="a\nb\n", work__step1__state="s", both="old", empty="")
            write(folder, age=5, older="5")
        else:
            write(folder, shard1_parquet="one" * 9_000_000, work__log_jsonl="b\nc\n", engine_log="growing", older="4")
            write(folder, age=-5, both="new")
        mirror.meet(folder)
        union = {"shard0.parquet": "zero", "shard1.parquet": "one" * 9_000_000, "work/step1/state": "s", "both": "new",
                 "older": "4", "empty": "", "work/log.jsonl": "a\nb\nc\n"}
        assert contents(folder) == union | ({} if first else {"engine.log": "growing"})

        # what node 0 has deleted since, nobody brings back; what another node has written since is sent
        if first:
            mirror.delete(folder, ["work/step1/state"])
        else:
            before = folder / "work" / "mine.jsonl"
            before.write_text("1\n")
            write(folder, age=-9, shard1_parquet="again")
        opened = None if first else before.open("a")
        mirror.meet(folder)
        del union["work/step1/state"]
        assert contents(folder).items() >= (union | {"shard1.parquet": "again", "work/mine.jsonl": "1\n"}).items()
        assert not (folder / "work" / "step1").exists()
        if opened:  # a file that a rank appends to stays the same file
            opened.write("2\n")
            opened.close()
        mirror.meet(folder)
        assert (folder / "work" / "mine.jsonl").read_text() == "1\n2\n"

        if not first:
            write(folder, extra="no", deep__extra="no", work__kept="scratch")
        mirror.spread(folder)
        assert "extra" not in contents(folder) and not (folder / "deep").exists()
        assert first or (folder / "work" / "kept").exists()

    on_two_nodes(tmp_path, check)


def test_stages_run_and_resume_on_copies(tmp_path):
    def check(world, run_dir):
        mirror.begin(world, run_dir)
        calls = []

        def run(stage, said="", fails=False, **inputs):
            calls.append(stage.name)
            mine = stage.work / f"part-{world.rank}"
            if not mine.exists():
                mine.write_text(f"{stage.name}{said} {world.rank}")
            stage.meet()
            parts = [(stage.work / f"part-{rank}").read_text() for rank in range(2)]
            if fails:
                raise RuntimeError
            if world.first:
                (stage.dir / "out.txt").write_text(" ".join(parts))

        def store():
            return Store(run_dir, world, Console(enabled=False))

        def stage(store, name, function=run, **inputs):
            return store.stage(name, function, config={}, inputs=inputs, kind="test", all_ranks=True)

        s = store()
        s.lock()
        a = stage(s, "a")
        b = stage(s, "b", before=a)
        assert (b.path / "out.txt").read_text() == "b 0 b 1" and not (b.path / "work").exists()
        assert len({str(x) for x in world.gather((a.hash, b.hash))}) == 1

        # a copy that is damaged, missing or of another run is replaced by node 0's, and nothing runs
        if not world.first:
            (a.path / "out.txt").write_text("damaged")
            os.rename(b.path, run_dir / "b.partial")
        calls.clear()
        b = stage(store(), "b", before=stage(store(), "a"))
        assert (a.path / "out.txt").read_text() == "a 0 a 1" and (b.path / "out.txt").exists()
        assert not (run_dir / "b.partial").exists()
        if not world.first:
            (b.path / "manifest.json").write_text("{}")
        b = stage(store(), "b", before=a)
        assert not calls and (run_dir / "stale").exists() != world.first

        # an interrupted stage resumes with the parts of both nodes, also if one has lost its own
        with pytest.raises(RuntimeError):
            stage(store(), "c", lambda stage, **inputs: run(stage, " before", fails=True), before=b)
        (run_dir / "c.partial" / "work" / f"part-{world.rank}").unlink()
        (run_dir / "c.partial" / ".met").unlink()
        assert (stage(store(), "c", before=b).path / "out.txt").read_text() == "c before 0 c before 1"

        # inputs from outside must be the same files
        outside = Path("rows.txt")
        outside.write_text(f"rows of {world.rank}")
        with pytest.raises(UserError, match=f"{os.uname().nodename}: rows.txt: is not what it is on node 0"):
            stage(store(), "d", rows=external(outside))

        def find():
            if not world.first:
                raise UserError("rows.txt: no such file or folder")

        with pytest.raises(UserError, match=f"{os.uname().nodename}: rows.txt: no such file"):
            mirror.on_nodes(world, find)
        with pytest.raises(UserError, match="recipe is not that of node 0"):
            _check_recipes(world, f"name: {world.rank}")
        with pytest.raises(UserError, match=r"sample\.budget=10: the nodes share no storage"):
            Pool(None, None, None, concurrency=1, budget=10, key="sample")
        s.unlock()

    on_two_nodes(tmp_path, check)
