#!/usr/bin/env bash
# One run of N processes on this machine, without ssh; each takes its share of the GPUs.
#   launch/local.sh 2 config=configs/tiny.yaml mesh.data=2
# Ctrl-C or SIGTERM asks all of them to save and stop; a second one ends them at once.
# Ends with process 0's exit code, or, where that is 0, with the first other one.
# Environment: PYTHON (the interpreter; default: that of the active environment, or else of .venv here, where uv sync makes
#   it), PPOJAX_PORT (default: a free one), CUDA_VISIBLE_DEVICES (default: all GPUs that nvidia-smi lists).
#   On a CPU each process is one device, unless JAX_NUM_CPU_DEVICES says how many.
# Was run: by the tests, with a stand-in for python (processes, variables, signals, exit codes); real runs of two CPU
# processes have the same variables, in tests/processes. Was not run: this script around a real run; GPUs.
set -uo pipefail

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N [config=...] [key=value ...]" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
if [[ -z "${PYTHON:-}${VIRTUAL_ENV:-}" && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
port=${PPOJAX_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')} || exit 1

# Without it a process does not know of how many GPUs it takes its share.
if [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] && gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') && ((gpus >= count)); then
  CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))
  export CUDA_VISIBLE_DEVICES
fi
export PPOJAX_COORDINATOR=127.0.0.1:$port PPOJAX_PROCESS_COUNT=$count PPOJAX_LOCAL_COUNT=$count
pids=()
for ((index = 0; index < count; index++)); do
  PPOJAX_PROCESS_INDEX=$index PPOJAX_LOCAL_INDEX=$index "$python" -m ppojax.train "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

code_of() { # PID: wait to its end, though signals interrupt the waiting
  local code
  while wait "$1"; code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do :; done
  return "$code"
}

first=0
for ((index = 0; index < count; index++)); do
  code_of "${pids[index]}"
  code=$?
  if ((first == 0)); then first=$code; fi
done
exit "$first"
