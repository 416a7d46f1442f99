# make bench    measure this machine: notebook 01 headless, rows and charts under results/local/
# make test     every test
# make test-models  50 tiny architectures under every CPU setting and engine: once a release
# make test-llamacpp  the setting cpu-gguf: its first run compiles llama.cpp into the environment (minutes)
# make notebook open the notebooks in JupyterLab
# make readme   write README.md, results/README.md and their charts anew from results/published/
# make test-colab  the notebooks in a replica of Colab's image (Python 3.13; its first run installs 5 GB into build/)
# make test-browser  notebook 01 and its panel in headless Chromium (your system's); screenshots in build/browser/
# make address URL=https://github.com/OWNER/NAME   give the project its home: badges, notebooks and README follow, and a
#               notebook on Colab then installs the commit that is checked out (push it first; again for each release)
# make clean    remove the environment and what was built

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(shell date +%Y%m%d-%H%M%S)
OUT    := results/local/$(STAMP)
PYTHON313 ?= $(lastword python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python3.13))
MODELS ?= ["distilgpt2", "gpt2", "smollm2-135m"]
COMMIT ?= $(shell git rev-parse HEAD)
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

ADDRESSED := pyproject.toml README.md CONTRIBUTING.md $(wildcard notebooks/*.ipynb)

.PHONY: bench test test-models test-llamacpp test-colab test-browser notebook readme address clean

bench: $(VENV)/ready
	mkdir -p $(OUT)
	$(BIN)/papermill notebooks/01_quantization_benchmark.ipynb $(OUT)/01_quantization_benchmark.ipynb \
	  -y '{models: $(MODELS), results: $(OUT)/rows.jsonl}'
	$(BIN)/python -c "import quantbench as qb; run = qb.Run.read('$(OUT)/rows.jsonl'); print(qb.show(run), qb.findings(run), sep='\n\n')"
	@ls -d $(OUT)/*

test: $(VENV)/ready
	$(BIN)/pytest -q -n 3 --dist loadfile -m "not alone and not models"
	$(BIN)/pytest -q -m alone

test-models: $(VENV)/ready
	$(BIN)/pytest -q -n 2 -m models tests/test_models.py

test-llamacpp: $(VENV)/ready
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) install --no-deps --require-hashes --requirement tests/llamacpp.txt
	$(BIN)/pytest -q tests/test_llamacpp.py

test-colab:
	$(PYTHON) tests/colab/replica.py $(PYTHON313) $(NOTEBOOKS)

test-browser: $(VENV)/ready
	$(BIN)/python tests/browser/drive.py

notebook: $(VENV)/ready
	$(BIN)/jupyter lab notebooks

readme: $(VENV)/ready
	$(BIN)/python docs/render.py
	$(BIN)/cog -r README.md results/README.md

address:
	@expr "$(URL)@$(COMMIT)" : 'https://github\.com/[A-Za-z0-9_.-]*/[A-Za-z0-9_.-]*@[0-9a-f]\{40\}$$' > /dev/null || { echo "in a clone: make address URL=https://github.com/OWNER/NAME"; exit 1; }
	old=$$(sed -n 's|^Repository = "\(.*\)"$$|\1|p' pyproject.toml) && sed -i.old \
	  -e '/^\*\*No address yet/,/^$$/d' \
	  -e 's|](https://[^)]*\(/blob/main/notebooks/\)|](https://colab.research.google.com/github/$(URL:https://github.com/%=%)\1|g' \
	  -e "s|$$old|$(URL)|g; /address, commit = /s|[0-9a-f]\{40\}|$(COMMIT)|" $(ADDRESSED) && rm $(ADDRESSED:=.old)

# The lock file has every package with its hashes, and only wheels are taken: nothing is resolved, no stranger's build
# runs. torch comes last: all that it needs is there by then, but for the CUDA libraries, which its build names itself.
$(VENV)/ready: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	grep -A 2 '^pip==' requirements.txt > $(VENV)/pip.txt
	$(PIP) install --no-deps --require-hashes --requirement $(VENV)/pip.txt
	$(PIP) install --no-deps --require-hashes --only-binary :all: --requirement requirements.txt
	$(PIP) install --group torch
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache results/local
