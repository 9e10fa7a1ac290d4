"""A recipe that would run, and what can be damaged of it: data, model, disk, or a finished run."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from strop.trainer.main import main
from strop.trainer.run.console import Console
from strop.trainer.run.store import Store
from strop.trainer.run.world import World


class Place:
    """A recipe of one round that would run, its prompts, ready data and model, each to be spoilt."""

    def __init__(self, recipe: Path, model: Path, finished: Path):
        self.recipe, self.dir, self.shared, self.finished = recipe, recipe.parent, model, finished
        self.run, self.prompts = self.dir / "runs" / "tiny", self.dir / "prompts.jsonl"

    def finish(self) -> None:
        """What a run of the recipe leaves, with the recipe of the run that is copied for it."""
        shutil.copytree(self.finished, self.run)
        text = (self.finished.parents[1] / "tiny.yaml").read_text()
        text = text.replace("sft: {", "sft: {snapshots: 1, ema_decay: 0.5, ")  # as the fixture tiny_run has it
        self.recipe.write_text(text.replace(str(self.finished.parent), str(self.dir / "runs")))

    def edit(self, old: str, new: str) -> None:
        text = self.recipe.read_text()
        assert old in text
        self.recipe.write_text(text.replace(old, new))

    def add(self, text: str) -> None:
        self.recipe.write_text(self.recipe.read_text() + text)

    def line(self, text) -> None:
        """One more row of prompts, the 101st."""
        with open(self.prompts, "ab") as f:
            f.write((text if isinstance(text, bytes) else json.dumps(text).encode()) + b"\n")

    def ready(self, kind: str, *rows: dict) -> None:
        """Ready data instead of prompts: nothing is sampled or evaluated."""
        path = self.dir / "ready.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        text = self.recipe.read_text()
        sources = text[text.index("  sources:"):text.index("sample:")]
        self.edit(sources, f"  {kind}: [{{name: mine, path: {path}}}]\n")
        self.edit("dpo: {" if kind == "sft" else "sft: {", "dpo: {enabled: false, " if kind == "sft" else
                  "sft: {enabled: false, ")

    def model(self) -> Path:
        """A copy of the model."""
        copy = self.dir / "model"
        shutil.copytree(self.shared, copy)
        self.edit(str(self.shared), str(copy))
        return copy

    def tokenizer(self, **keys) -> None:
        path = self.model() / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    def config(self, **keys) -> None:
        path = self.model() / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    def template(self, text: str) -> None:
        (self.dir / "chat.jinja").write_text(text)
        self.edit("}\ndata:", f", chat_template: {self.dir / 'chat.jinja'}}}\ndata:")

    def weights(self, change) -> None:
        path = self.model() / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def two_gpus(place: Place, ranks: int) -> None:
    place.patch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 2))
    place.patch.setenv("LOCAL_WORLD_SIZE", str(ranks))


def source(place: Place, path: str, data: bytes | None) -> None:
    if data is not None:
        (place.dir / path).write_bytes(data)
    place.edit(str(place.prompts), str(place.dir / path))


def mistyped(place: Place) -> None:
    pq.write_table(pa.table({"prompt": list(range(50)), "answer": ["1"] * 50}), place.dir / "p.parquet")
    place.edit(str(place.prompts), str(place.dir / "p.parquet"))


def cut_parquet(place: Place) -> None:
    pq.write_table(pa.table({"prompt": ["x"] * 50, "answer": ["1"] * 50}), place.dir / "p.parquet")
    halve(place.dir / "p.parquet")
    place.edit(str(place.prompts), str(place.dir / "p.parquet"))


def pickled(place: Place) -> None:
    folder = place.model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(place: Place) -> None:
    """A model that brings its own Python, which leaves a file behind if it runs."""
    place.config(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})
    (place.dir / "model" / "mine.py").write_text(f"open({str(place.dir / 'executed')!r}, 'w')\n")


def unknown_head(place: Place) -> None:
    """A model whose logits are scaled in a way that no key of its config tells."""
    import transformers.models.llama.modeling_llama as llama

    real = llama.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    place.patch.setattr(llama.LlamaForCausalLM, "forward", forward)
    place.ready("sft", {"prompt": "a", "completion": "b"})


def explode(place: Place) -> None:
    place.ready("sft", *({"prompt": "ab", "completion": f"cd{i}"} for i in range(20)))
    place.edit("lr: 1.0e-3", "lr: 1.0e+30")


def flip(path: Path) -> None:
    """One bit in the middle, as a bad disk does it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def after_a_run(place: Place, damage, again: str) -> None:
    """Damages a file of a finished run from which the folder `again` has to be made."""
    place.finish()
    damage(place.run)
    shutil.rmtree(place.run / again)
    shutil.rmtree(place.run / "final", ignore_errors=True)


def damaged(file: str, again: str, damage=flip):
    return lambda place: after_a_run(place, lambda run: damage(run / file), again)


def damaged_at_last(place: Place) -> None:
    place.finish()
    flip(place.run / "final/model.safetensors")


def stopped_in_training(place: Place) -> None:
    """A run that was killed behind its first resume point, which is damaged since."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.trainer.training.loop.stop_if_not_finite", stop_at_step_2)
        with pytest.raises(InterruptedError):
            main([str(place.recipe), "rounds=1", "--debug"])
    flip(place.run / "round-00/sft.partial" / "work/step-000001/state.safetensors")


def stop_at_step_2(stage, engine, *rest):
    if engine.step_index == 2:
        raise InterruptedError


def full(place: Place, what: str, error: Exception) -> None:
    def refuse(*args, **kwargs):
        raise error

    place.patch.setattr(what, refuse)


def no_space_for(name: str):
    """A disk that is full when the table `name` is to be written."""
    def spoil(place: Place) -> None:
        def write(table, path, **how):
            if name in path.name:
                raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
            real(table, path, **how)

        real = pq.write_table
        place.patch.setattr("pyarrow.parquet.write_table", write)

    return spoil


def held(place: Place) -> None:
    place.holder = Store(place.run, World(), Console(enabled=False))
    place.holder.lock()
