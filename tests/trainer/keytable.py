"""The keys of a recipe, and the stages that a change of each makes stale; written by hand for test_keys.py."""

from dataclasses import dataclass

STAGES = ("prompts", "baseline-held-out", "baseline", "sample", "score", "select", "sft", "reference", "dpo", "merge",
          "held-out", "evaluate", "final")
PROMPTS = {"prompts", "final"}
SELECT = {"select", "final"}
SAMPLE = {"sample", "final"}
SFT = {"sft", "final"}
DPO = {"dpo", "final"}
PAIRS = {"reference", "dpo", "final"}  # keys on which the reference table depends too
LORA = {"sft", "dpo", "final"}
MEASURE = {"baseline", "evaluate", "final"}
HELD_OUT = {"baseline-held-out", "held-out", "final"}
SCORES = MEASURE | {"score"}
NUMBERS = {"baseline-held-out", "sample", "sft", "reference", "dpo", "held-out", "final"}
LOADING = NUMBERS | {"select"}
NOTHING: set[str] = set()


@dataclass
class Also:
    """A new value that needs other keys to change with it."""

    value: object
    others: dict


# key: (another value, the stages that are stale by themselves); what is made from these is stale too, as the plan says
TABLE = {
    "name": ("other", {"final"}),
    "output_dir": ("{folder}/elsewhere", NOTHING),
    "seed": (7, {"prompts", "sample", "select", "sft", "reference", "dpo", "final"}),
    "rounds": (2, {"final"}),
    "device": ("auto", NUMBERS),
    "dtype": ("bfloat16", NUMBERS),
    "attention": ("sdpa", {"sft", "reference", "dpo", "final"}),
    "threads": (2, NOTHING),
    "model.path": ("{folder}/other-model", {"baseline-held-out"} | SAMPLE),  # then all that is made from samples
    "model.chat_template": ("{folder}/other.jinja", LOADING),
    "model.trust_remote_code": (True, LOADING),
    "engine.kind": ("local", NOTHING),
    "engine.timeout": (99, NOTHING),
    "engine.sequence_parallel": (2, NOTHING),
    "lora.rank": (4, LORA),
    "lora.alpha": (8.0, LORA),
    "lora.dropout": (0.5, LORA),
    "lora.target_modules": (["q_proj"], LORA),
    "data.sources.N.name": ("renamed", {"prompts", "sample", "select"} | SCORES),
    "data.sources.N.path": ("{folder}/other.jsonl", PROMPTS),
    "data.sources.N.reasoning_gym": (Also("chain_sum", {"data.sources.0.path": None}),
                                     {"prompts", "select", "final"}),  # its prompts are templated
    "data.sources.N.reasoning_gym_config": ({"min_terms": 2}, PROMPTS),
    "data.sources.N.size": (50, PROMPTS),
    "data.sources.N.prompt_column": ("question", PROMPTS | SCORES),
    "data.sources.N.answer_column": ("truth", PROMPTS | SCORES),
    "data.sources.N.ignore_columns": (["answer"], PROMPTS),
    "data.sources.N.system_prompt": ("Be brief.", PROMPTS),
    "data.sources.N.prompt_template": ("Q: {prompt}", PROMPTS | SCORES | SELECT),
    "data.sources.N.verifier": (Also("exact", {"data.sources.0.scorers": []}), PROMPTS | SCORES | SELECT),
    "data.sources.N.verifier_args": (Also({"pattern": "[a-z]"}, {"data.sources.0.scorers": [],
                                                                 "data.sources.0.verifier": "regex"}),
                                     PROMPTS | SCORES | SELECT),
    "data.sources.N.scorers.N.name": ("other", SCORES | SELECT),
    "data.sources.N.scorers.N.rule": (Also("exact", {"data.sources.0.scorers.0.python": None}),
                                      PROMPTS | SCORES | SELECT),  # prompts, since a rule checks the answers
    "data.sources.N.scorers.N.args": (Also({"pattern": "[a-z]"}, {"data.sources.0.scorers.0.python": None,
                                                                  "data.sources.0.scorers.0.rule": "regex",
                                                                  "data.sources.0.scorers.0.name": "grade"}),
                                      PROMPTS | SCORES),
    "data.sources.N.scorers.N.python": ("{folder}/mine.py:other", SCORES | SELECT),
    **{f"data.sources.N.scorers.N.code.{key}": (Also(value, {"data.sources.0.scorers.0.python": None, **others}),
                                                SCORES | SELECT) for key, value, others in (
        ("kind", "pytest", {}), ("tests_column", "t", {}), ("entry_column", "e", {}), ("prefix_column", "p", {}),
        ("module", "m", {}), ("command", ["cat"], {"data.sources.0.scorers.0.code.kind": "stdio"}), ("file", "f", {}),
        ("processes", 2, {}), ("output_kb", 2, {}))},
    "data.sources.N.scorers.N.reward_model": (Also("{folder}/reward-model", {"data.sources.0.scorers.0.python": None,
                                                                            "data.sources.0.scorers.0.name": "grade"}),
                                              SCORES),
    **{f"data.sources.N.scorers.N.judge.{key}": (
        Also(value, {"data.sources.0.scorers.0.python": None, "data.sources.0.scorers.0.name": "grade",
                     "data.sources.0.scorers.0.judge.mode": mode}), SCORES) for key, value, mode in (
        ("mode", "rubric", "rubric"), ("rubric", "It rhymes.", "rubric"), ("scale", [1, 5], "rubric"),
        ("template", "{prompt} {completion} {verdict}", "rubric"), ("opponents", 2, "pairwise"))},
    "data.sources.N.scorers.N.judge.labels": (
        Also(["a", "b"], {"data.sources.0.scorers.0.python": None, "data.sources.0.scorers.0.name": "grade",
                          "data.sources.0.scorers.0.weight": 0.0, "data.sources.0.scorers.0.judge.mode": "topic"}),
        SCORES | SELECT),
    **{f"data.sources.N.scorers.N.judge.models.N.{key}": (
        Also(value, {"data.sources.0.scorers.0.python": None, "data.sources.0.scorers.0.name": "grade",
                     "data.sources.0.scorers.0.judge": {"mode": "rubric", "models": [{key: value}]}}), SCORES)
       for key, value in (("name", "other"), ("path", "{folder}/other-model"))},
    "data.sources.N.scorers.N.weight": (2.0, MEASURE | SELECT),
    "data.sources.N.scorers.N.seconds": (1.0, SCORES),
    "data.sources.N.scorers.N.memory_gb": (1.0, SCORES),
    "data.sources.N.share": (2.0, {"prompts", "sample", "final"}),
    "data.sources.N.templated": (True, {"prompts", "select", "final"}),  # it decides what ready data repeats
    "data.validation": (9, PROMPTS),
    "data.test": (9, PROMPTS),
    "data.max_bad_rows": (1, {"prompts", "select", "final"}),
    **{f"data.{kind}.N.{key}": (value, SELECT) for kind in ("sft", "preferences") for key, value in {
        "name": "renamed", "path": f"{{folder}}/other-{kind}.jsonl", "rounds": [0], "weight": 2.0,
        "near_duplicates": False, "ignore_columns": ["id"]}.items()},
    "filter.near_duplicates": (0.5, {"prompts", "select", "final"}),
    "filter.decontaminate": (6, {"prompts", "select", "final"}),
    "filter.max_repetition": (0.4, {"prompts", "select", "final"}),
    "filter.min_tokens": (2, SELECT),
    "filter.max_tokens": (100, SELECT),
    "filter.keep_truncated": (True, SELECT),
    "filter.semantic": (Also(0.9, {"filter.embedder": "{folder}/other-model"}), SELECT),
    "filter.embedder": ("{folder}/other-model", NOTHING),  # with filter.semantic its content is an input of select
    "filter.quality": ("regex", SELECT),
    "filter.difficulty": ("regex", SELECT),
    # before sampling, from the round on: the plan has a stage more
    "write_prompts.enabled": (True, {"sample", "score", "select", "final"}),
    **{f"write_prompts.{key}": (value, {"final"}) for key, value in {  # nothing is written
        "name": "other", "source": "digits", "prompts": 9, "asks": 99, "examples": 2, "topics": ["cats"],
        "template": "{examples} {topic} {format}", "votes": 3, "min_tokens": 2, "max_tokens": 99, "share": 2.0,
        "temperature": 0.5, "top_p": 0.5, "max_new_tokens": 99, "shard_asks": 2, "batch_size": 16}.items()},
    "write_prompts.path": ("elsewhere", NOTHING),  # its content counts
    "sample.prompts": (23, SAMPLE),
    "sample.k": (7, SAMPLE),
    "sample.temperature": (0.9, SAMPLE),
    "sample.top_k": (5, SAMPLE),
    "sample.top_p": (0.9, SAMPLE),
    "sample.max_new_tokens": (23, SAMPLE),
    "sample.batch_size": (16, SAMPLE),
    "sample.shard_prompts": (5, SAMPLE),
    "sample.enough": (2, SAMPLE),
    "score.correct_at": (0.5, MEASURE | {"select"}),
    "score.correct_by": ("regex", MEASURE | {"select"}),
    "score.max_errors": (5, NOTHING),
    "score.workers": (1, NOTHING),
    "select.by": ("regex", SELECT),
    "select.pair_margin_unit": ("z", SELECT),
    "merge.promote_on": ("mean", NOTHING),
    "select.accumulate": (False, SELECT),
    "select.pass_rate_min": (0.1, SELECT),
    "select.pass_rate_max": (0.9, SELECT),
    "select.values": ({"grade": [0.0, None]}, SELECT),
    "select.topic_share": (Also(0.5, {"data.sources.0.scorers.0.python": None, "data.sources.0.scorers.0.name": "grade",
                                      "data.sources.0.scorers.0.weight": 0.0, "data.sources.0.scorers.0.judge": {
                                          "mode": "topic", "labels": ["a", "b"]}}), SCORES | SELECT),
    "select.sft_min_score": (0.5, SELECT),
    "select.sft_per_prompt": (2, SELECT),
    "select.sft_cut": (True, SELECT),
    "select.pair_margin": (0.4, SELECT),
    "select.pairs_per_prompt": (2, SELECT),
    "select.tie_break": ("first", SELECT),
    "sft.enabled": (False, {"reference", "final"}),  # whose weights are then those that the round began with
    "sft.start": ("base", SFT),
    "dpo.enabled": (False, {"merge", "final"}),
    "dpo.loss": ("ipo", DPO),
    "dpo.desirable_weight": (Also(2.0, {"dpo.loss": "kto"}), {"select"} | PAIRS),  # other rows, and their reference
    "dpo.undesirable_weight": (Also(2.0, {"dpo.loss": "bco"}), {"select"} | PAIRS),
    "dpo.rpo_eta": (Also(2.0, {"dpo.loss": "rpo"}), DPO),
    "dpo.rpo_divergence": (Also("squared", {"dpo.loss": "rpo"}), DPO),
    "dpo.beta": (0.2, DPO),
    "dpo.label_smoothing": (0.1, DPO),
    "dpo.nll_weight": (0.2, DPO),
    "dpo.nll_normalization": ("sequence_mean", DPO),
    "dpo.mask_template_tokens": (False, PAIRS),
    "dpo.reference": ("base", PAIRS),
    "dpo.pairs": ("policy", DPO),  # the pairs are then made from what runs first
    **{f"{stage}.{key}": (value, own) for stage, own, rows in (("sft", SFT, SFT), ("dpo", DPO, PAIRS))
       for key, value, own in (
           ("epochs", 2.0, rows), ("batch_size", 3, rows), ("max_tokens", 4096, rows), ("max_length", 400, rows),
           ("lr", 0.5, own), ("schedule", "linear", own), ("warmup_ratio", 0.2, own), ("min_lr_ratio", 0.1, own),
           ("optimizer", "muon", own), ("moments", "int8", own),
           ("weight_decay", 0.1, own), ("betas", [0.9, 0.99], own), ("eps", 1e-6, own), ("grad_clip", 2.0, own),
           ("activation_checkpointing", True, own), ("compile", True, own), ("snapshots", 2, own),
           ("ema_decay", 0.25, own),
           ("eval_steps", 3, own), ("eval_prompts", 5, own), ("max_cut_rise", 0.5, own),
           ("max_length_ratio", 3.0, own), ("max_kl", 0.5, own),
           ("bema", True, own), ("checkpoint_steps", 3, NOTHING))},
    **{f"{stage}.activation_offload": (Also(True, {f"{stage}.activation_checkpointing": True}), own)  # which counts
       for stage, own in (("sft", SFT), ("dpo", DPO))},
    **{f"{stage}.{key}": (Also(value, {f"{stage}.bema": True}), own) for stage, own in (("sft", SFT), ("dpo", DPO))
       for key, value in (("bema_bias_power", 0.3), ("bema_ema_power", 0.4), ("bema_lag", 5))},
    # in another dtype, which these stages see too; test_state.py changes it alone
    **{f"{stage}.masters": (Also("split", {"dtype": "bfloat16"}), NUMBERS) for stage in ("sft", "dpo")},
    "merge.method": ("average", {"merge", "final"}),
    "merge.members": (Also(["dpo", "sft"], {"merge.method": "average"}), {"merge", "final"}),
    "merge.weights": (Also([1.0, 2.0], {"merge.method": "average"}), {"merge", "final"}),
    "merge.t": (Also(0.25, {"merge.method": "slerp"}), {"merge", "final"}),
    "merge.interpolate": (0.5, {"merge", "final"}),
    "merge.promote": ("last", NOTHING),  # here both promote the same weights
    "evaluate.max_new_tokens": (2, HELD_OUT | LORA),  # training checks completions of that length
    "merge.max_cut_rise": (0.2, NOTHING),
    "evaluate.batch_size": (16, HELD_OUT),
    "evaluate.kl_prompts": (3, HELD_OUT),
    "evaluate.bootstrap": (50, {"final"}),
    "log.interval": (2, NOTHING),
    "log.tensorboard": (True, NOTHING),
    "log.report_to": (["wandb"], NOTHING),
}


# the keys of method reward's own section; the run has these stages
