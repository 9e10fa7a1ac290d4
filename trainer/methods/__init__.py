"""Methods: plain functions method(run, recipe) -> the published artifact. The recipe's key `method` picks one."""

from strop.trainer.methods.llama2 import llama2
from strop.trainer.methods.llama3 import llama3
from strop.trainer.methods.nemotron import nemotron
from strop.trainer.methods.reward import reward
from strop.trainer.methods.rounds import rounds

METHODS = {"rounds": rounds, "llama2": llama2, "llama3": llama3, "nemotron": nemotron, "reward": reward}
