#!/usr/bin/env bash
# Many processes on one comparison: they share its cells. A small model leaves room on a large GPU.
#
#   benchmarks/compare/share.sh PROCESSES SECONDS FOLDER RECIPE [ARGUMENT ...]
#
# Every process is the same `loftq lab compare RECIPE -o FOLDER ...`, stopped after SECONDS; what it
# has done by then is kept, and the same call goes on. Ends with the table of the rows that are there.
set -u
processes=$1 seconds=$2 folder=$3 recipe=$4
shift 4
mkdir -p "$(dirname "$folder")"
for place in $(seq "$processes"); do
    timeout --signal=INT --kill-after=10 "$seconds" \
        python -W ignore -m loftq lab compare "$recipe" -o "$folder" "$@" \
        >"$folder.$place.log" 2>&1 &
done
wait
python -W ignore -m loftq lab compare "$recipe" -o "$folder" "$@" --table
