#!/usr/bin/env bash
# Runs the stored notebooks in order and compares every checked output, with results and figures in empty
# temporary folders, so that every checked number is computed afresh.    tests/notebooks.sh .venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export MOE_RESULTS_DIR=$scratch/results MOE_FIGURES_DIR=$scratch/figures
"$1/pytest" --nbval --nbval-current-env --nbval-cell-timeout 900 -p no:cacheprovider \
  notebooks/00_tour.ipynb notebooks/10_snnl_moe.ipynb notebooks/90_report.ipynb
