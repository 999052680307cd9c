# make report | render | check | test | faults | cluster | lab | data | plan | bench | readme | notebooks | clean
#   PROFILE=digits|core|paper   whose results (report, plan)
#   CORES=n                     how many processes
#   EXECUTOR=slurm              run on a cluster, see profiles/slurm/config.yaml (report)
#   NODES=n GPUS=n              a cluster to simulate (plan)
#   KILLS=n                     how many random kills (faults)
#   PYTHON=python3.12           which Python makes .venv
#   TORCH_INDEX=URL             take torch from there: https://download.pytorch.org/whl/cpu is without CUDA
PROFILE ?= digits
ifeq ($(origin CORES),undefined) # nproc believes OMP_NUM_THREADS, which is about threads
CORES := $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || sysctl -n hw.ncpu)
endif
PYTHON ?= python3
TORCH_INDEX ?=
KILLS ?= 5
EXECUTOR ?=
NODES ?=
GPUS ?=
BIN := .venv/bin
SCOPES := --dist loadscope --no-loadscope-reorder
export JUPYTER_PREFER_ENV_PATH := 1# a kernel in the user's home must not shadow the one in .venv

.DEFAULT_GOAL := report
.PHONY: report render check test faults cluster lab data plan bench readme notebooks clean

no_digits = $(subst 9,,$(subst 8,,$(subst 7,,$(subst 6,,$(subst 5,,$(subst 4,,$(subst 3,,$(subst 2,,$(subst \
  1,,$(subst 0,,$(1)))))))))))
positive = $(filter 1,$(words $(1))$(call no_digits,$(1))$(filter 0%,$(1)))# one word, digits alone, no 0 ahead
# Whatever else these hold never reaches a shell. `value`: not even make expands it.
ifneq ($(filter report render plan,$(or $(MAKECMDGOALS),report)),)
ifneq ($(words $(value PROFILE))$(filter-out digits core paper,$(value PROFILE)),1)
$(error PROFILE must be digits, core or paper, got '$(value PROFILE)')
endif
endif
ifneq ($(filter report check test plan,$(or $(MAKECMDGOALS),report)),)
ifeq ($(call positive,$(value CORES)),)
$(error CORES must be an integer of 1 or more, got '$(value CORES)')
endif
endif
ifneq ($(value EXECUTOR),)
ifneq ($(words $(value EXECUTOR))$(filter-out $(notdir $(wildcard profiles/*)),$(value EXECUTOR)),1)
$(error EXECUTOR must be one of the folders of profiles, got '$(value EXECUTOR)')
endif
endif
ifneq ($(filter plan,$(MAKECMDGOALS)),)
ifneq ($(value NODES)$(value GPUS),)
ifneq ($(call positive,$(value NODES))$(call positive,$(or $(value GPUS),1)),11)
$(error NODES and GPUS must be integers of 1 or more, got '$(value NODES)' and '$(value GPUS)')
endif
endif
endif
ifneq ($(filter faults,$(MAKECMDGOALS)),)
ifeq ($(call positive,$(value KILLS)),)
$(error KILLS must be an integer of 1 or more, got '$(value KILLS)')
endif
endif

.venv/ready: requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12"; exit 1; }
	@echo "installing the locked packages into .venv, once; this takes some minutes"
	@"$(PYTHON)" -m venv --clear .venv
ifeq ($(TORCH_INDEX),)
	@cp requirements.lock .venv/requirements.lock
else # that index has other files, so other hashes: torch by version, everything else by hash
	@$(BIN)/pip install --quiet --no-deps --index-url "$(TORCH_INDEX)" \
	  $$(grep -oE '^(torch|torchvision)==[0-9.]+' requirements.lock)
	@awk '/^[^ #]/ { keep = !/^(torch==|torchvision==|triton==|nvidia-|cuda-)/ } keep' \
	  requirements.lock > .venv/requirements.lock
endif
	@$(BIN)/pip install --quiet --require-hashes -r .venv/requirements.lock
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --no-index -e .
	@touch $@

# --nolock: after a kill Snakemake's lock stays and would refuse to go on; the engine locks each run itself.
report: .venv/ready
	@$(if $(filter-out digits,$(PROFILE)),$(BIN)/python -m moe_study data --profile $(PROFILE))
ifeq ($(EXECUTOR),)
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) --config profile=$(PROFILE) --keep-going --rerun-incomplete \
	  --nolock --rerun-triggers mtime input --quiet host progress rules reason
else
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --workflow-profile profiles/$(EXECUTOR) --config profile=$(PROFILE)
endif
	@echo "The report: $$($(BIN)/python -m moe_study where --profile $(PROFILE))"

render: .venv/ready # the report of what is finished; trains nothing
	@mkdir -p build/$(PROFILE)
	@$(BIN)/papermill --no-progress-bar notebooks/90_report.ipynb build/$(PROFILE)/90_report.ipynb \
	  -p profile $(PROFILE) > build/$(PROFILE)/90_report.log 2>&1 || { cat build/$(PROFILE)/90_report.log; exit 1; }
	@page=$$($(BIN)/python -m moe_study where --profile $(PROFILE)) && \
	  $(BIN)/python -m moe_study.report.page build/$(PROFILE)/90_report.ipynb "$$page" && echo "The report: $$page"

faults: .venv/ready # kills, damaged files, full disks: some minutes; KILLS=100 for the whole campaign
	@FAULTS_RECORD=1 FAULTS_KILLS=$(KILLS) $(BIN)/pytest -n 0 -s tests/faults

cluster: .venv/ready # three Slurm nodes on this machine; RECORD=1 writes results/cluster
	@CLUSTER_RECORD=$(if $(RECORD),1) $(BIN)/pytest -n 0 -s -m cluster tests/cluster

check: .venv/ready # lint, types, fast tests: two minutes
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/pytest -n $(CORES) $(SCOPES) -m "not slow and not faults and not cluster" tests

# The digits runs are trained once, into a temporary folder, or taken from TRAINED: a results folder that this
# code has filled (in CI, `make report` has). Tests and notebooks compare their numbers.
test: .venv/ready
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && export TRAINED="$${TRAINED:-$$scratch}" && \
	  $(BIN)/python -m moe_study run --profile digits --workers $(CORES) --out "$$TRAINED" && \
	  $(BIN)/pytest -n $(CORES) $(SCOPES) -m "not faults and not cluster" tests && \
	  tests/notebooks.sh $(BIN) $(CORES)

lab: .venv/ready
	@$(BIN)/jupyter lab --notebook-dir=notebooks

data: .venv/ready
	@$(BIN)/python -m moe_study data

plan: .venv/ready
	@$(BIN)/python -m moe_study plan --profile $(PROFILE) --workers $(CORES) \
	  $(if $(NODES),--nodes $(NODES)) $(if $(GPUS),--gpus $(GPUS))

bench: .venv/ready # ours against its peers: ratios within one run; some minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks all

readme: .venv/ready
	@$(BIN)/python -m moe_study readme

# Execute the notebooks on the embedded data and store them with their outputs, as they are committed.
notebooks: .venv/ready
	@$(BIN)/ruff format notebooks
	@for name in 00_tour 10_snnl_moe 11_collapse 20_ac_vision 21_ac_language 30_snnl_x_ac 50_dose_response 90_report; do \
	  $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN \
	    --ExecutePreprocessor.record_timing=False notebooks/$$name.ipynb || exit 1; done

# Everything that can be made again from what is committed; data sets and committed results stay.
clean:
	@rm -rf .venv .snakemake build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	@rm -rf results/digits figures/digits results/*/.work
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
