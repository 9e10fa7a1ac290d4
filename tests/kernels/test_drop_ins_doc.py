"""The code in docs/drop-ins.md runs, on a tiny random model."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import character_tokenizer

pytest.importorskip("trl")
pytest.importorskip("liger_kernel")
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from strop.kernels import preference_means

PAIRS = [
    {"prompt": "say 3 or 4: ", "chosen": "3", "rejected": "four, I think"},
    {"prompt": "what is left of twelve, less seven?", "chosen": "five is left", "rejected": "6"},
    {"prompt": "no", "chosen": "yes", "rejected": "yes and no"},
    {"prompt": "spell cat", "chosen": "c-a-t", "rejected": "k-a-t!"},
    {"prompt": "more", "chosen": "most", "rejected": "less, if you please"},
]
DROP_INS = (Path(__file__).resolve().parents[2] / "docs" / "drop-ins.md").read_text(encoding="utf-8")
BLOCKS = [
    (section.splitlines()[0], block)
    for section in re.split(r"^## ", DROP_INS, flags=re.M)
    for block in re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
]


@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_what_the_documentation_shows_runs(tmp_path, monkeypatch, block):
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    monkeypatch.chdir(tmp_path)
    on_cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
    monkeypatch.setattr(trl, "DPOConfig", partial(trl.DPOConfig, report_to="none", **on_cpu))
    ids = torch.randint(0, len(tokenizer), (4, 7))
    hidden = model.model(ids).last_hidden_state
    names = {
        "model": model,
        "ref_model": model,
        "input_ids": ids,
        "labels": ids,
        "hidden": hidden,
        "ref_hidden": hidden.detach(),
        "logits": model(ids).logits,
    }
    exec(compile(block, "drop-ins.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 3
    if "policy" in names:
        means = preference_means(names["metrics"])
        assert means["loss"] < 0.6 and means["rewards/margins"] > 0.1  # ln 2 and 0 at the start
