#!/usr/bin/env bash
# Runs the stored notebooks in order and compares every checked output, with results and figures in empty
# temporary folders, so that every checked number is computed afresh.    tests/notebooks.sh .venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export MOE_RESULTS_DIR=$scratch/results MOE_FIGURES_DIR=$scratch/figures

run() { "$bin/pytest" "$@" --nbval-current-env --nbval-cell-timeout 900 -p no:cacheprovider; }

# 21 reads the documentation of the installed scikit-learn: of a release with another text it is run but not
# compared.
docs=--nbval
"$bin/python" -c 'import sys; from moe_study.data import text; sys.exit(not text.docs_is_known())' || docs=--nbval-lax
run --nbval notebooks/00_tour.ipynb notebooks/10_snnl_moe.ipynb notebooks/11_collapse.ipynb notebooks/20_ac_vision.ipynb
run $docs notebooks/21_ac_language.ipynb
run --nbval notebooks/30_snnl_x_ac.ipynb notebooks/50_dose_response.ipynb
# 90 is stored on the committed results of profile core.
unset MOE_RESULTS_DIR
run --nbval notebooks/90_report.ipynb
