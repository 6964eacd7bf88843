#!/usr/bin/env bash
# start_or_resume.sh RUN python ray_jobs/train.py ...
# Runs the command, which is to write to RUN: out/name/trial of a run, out/name of an experiment. Where RUN is there
# already, the command goes on with it instead. So the same line can be given again after any failure.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: start_or_resume.sh RUN python ray_jobs/train.py ..." >&2; exit 2; }
run=$1
shift
if [ -f "$run/config.yaml" ] || [ -f "$run/experiment.json" ]; then
    exec "$1" "$2" --resume "$run"
fi
exec "$@"
