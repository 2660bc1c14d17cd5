# make run · make test · make lab · make bench · make docs      (PYTHON=/path/to/python3.12 make run takes that Python for a new .venv)

# The first Python that runs and is new enough.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

# Idle OpenMP threads that wait busily can slow two processes down a hundredfold: one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: run test lab bench docs study gpu-queue notebooks findings pictures clean

# Prunes small networks gradually, in about a minute: table here, picture and notebook in build/.
run: .venv/installed
	@$(BIN)/python docs/execute.py --show --output build notebooks/gradual_pruning.ipynb
	@echo "picture: build/gradual_pruning.png"

# Everything: unit tests, and all notebooks compared with their stored outputs. FAST=1 leaves out slow tests and notebooks.
test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --durations=10 $(if $(FAST),-m "not slow" tests,--nbval tests notebooks)

# JupyterLab refuses to run as root, but in a container there is often no other user. Further options: LAB=--port=9999
# The server's root is the repository, so that notebooks show the pictures in images/.
lab: .venv/installed
	@echo "If no browser opens, copy the address with ?token= from below into one. From another machine, first run there:"
	@echo "    ssh -L 8888:localhost:8888 $$(whoami)@$$(hostname)"
	@echo "In a container, publish the port (docker run -p 8888:8888) and use: make lab LAB=--ip=0.0.0.0"
	@test "$$(id -u)" != 0 || echo "You are root, which JupyterLab refuses by default; it is started with --allow-root."
	@$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks \
		$$(test "$$(id -u)" != 0 || echo --allow-root) $(LAB)

# Side by side with the peers: prints a table and writes it to benchmarks/. Some rows only: make bench ROWS="prune grasp*"
# GROWTH=1 measures how cost grows instead, and draws growth.png. A peer that cannot be installed is left out.
bench: .venv/installed build/peers
	@$(BIN)/python -m benchmarks $(if $(GROWTH),--growth,$(ROWS))

build/peers:
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ torch-pruning fasterai fastcore einops
	@mkdir -p $@

# The notebooks, the API, the results and an explorer that needs no kernel, as pages in build/site: a few minutes.
docs: .venv/installed
	$(BIN)/python docs/build.py
	@echo "open build/site/index.html"

# A notebook's sweep in a larger size, from a shell: make study NAME=gradual_vs_instant SIZE=medium BUDGET=3600
# Finished runs are kept in results/; call it again until it says that none is missing. PROCESSES=8 lets so many runs
# share the cores or a GPU, which small networks leave idle.
study: .venv/installed
	$(if $(NAME),,$(error which notebook? make study NAME=gradual_vs_instant SIZE=medium BUDGET=3600))
	$(if $(PROCESSES),PRUNEUTILS_PROCESSES=$(PROCESSES)) $(BIN)/python docs/execute.py --study --size $(or $(SIZE),full) $(if $(BUDGET),--budget $(BUDGET)) notebooks/$(NAME).ipynb

# What waits for a GPU, as far as it gets in BUDGET seconds; call it again until no study says that runs are missing.
# Many small networks share the card, under NVIDIA's MPS where it is installed. make gpu-queue BUDGET=480 PROCESSES=16
gpu-queue: .venv/installed
	@if command -v nvidia-cuda-mps-control > /dev/null; then nvidia-cuda-mps-control -d; fi
	@end=$$(($$(date +%s) + $(or $(BUDGET),480))); \
	for name in $(or $(QUEUE),gradual_pruning pruning_at_initialization filter_pruning); do \
		left=$$((end - $$(date +%s))); test $$left -gt 0 || break; \
		$(MAKE) --no-print-directory study NAME=$$name SIZE=$(or $(SIZE),full) BUDGET=$$left PROCESSES=$(or $(PROCESSES),16) || exit 1; \
	done

# For maintainers: execute all notebooks in place, in quick size; store their outputs, and their pictures in images/.
notebooks: .venv/installed
	$(BIN)/python docs/execute.py notebooks/*.ipynb

# For maintainers: what README says was found, computed anew from results/; and the explorer's film and screenshots.
findings: .venv/installed
	$(BIN)/python docs/results.py

pictures: .venv/installed
	for what in film asked synflow panel; do $(BIN)/python docs/record.py $$what || exit 1; done

clean:
	rm -rf .venv build

.venv/installed: pyproject.toml constraints.txt
	@"$(or $(PYTHON),python3)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pruneutils needs Python 3.11 or newer, and %s is %d.%d; name another: make PYTHON=/path/to/python3.11" % ((sys.executable,) + sys.version_info[:2]))'
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks,docs,test]'
	@touch $@
