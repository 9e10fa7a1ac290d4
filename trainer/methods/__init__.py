"""Methods: plain functions method(run, recipe) -> the published artifact. The recipe's key `method` picks one."""

from strop.trainer.methods.llama3 import llama3
from strop.trainer.methods.reward import reward

METHODS = {"llama3": llama3, "reward": reward}
