"""Methods: plain functions method(run, recipe) -> the published artifact. The recipe's key `method` picks one."""

from strop.trainer.methods.best_of_n import best_of_n
from strop.trainer.methods.committee import committee
from strop.trainer.methods.constitutional import constitutional
from strop.trainer.methods.instructgpt import instructgpt
from strop.trainer.methods.llama2 import llama2
from strop.trainer.methods.llama3 import llama3
from strop.trainer.methods.nemotron import nemotron
from strop.trainer.methods.online_dpo import online_dpo
from strop.trainer.methods.reward import reward
from strop.trainer.methods.rounds import rounds
from strop.trainer.methods.self_distill import self_distill
from strop.trainer.methods.warp import warp

METHODS = {"rounds": rounds, "llama2": llama2, "llama3": llama3, "nemotron": nemotron, "reward": reward,
           "constitutional": constitutional, "self_distill": self_distill, "best_of_n": best_of_n,
           "committee": committee, "online_dpo": online_dpo, "instructgpt": instructgpt,
           "warp": warp}
