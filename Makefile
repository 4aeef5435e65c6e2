# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
URL ?= http://127.0.0.1:8080
DATA ?= .hallmark
READY := $(VENV)/.installed
# As many processes as there are processors, up to four; each takes up to 2 GB of memory.
TEST_PROCESSES ?= logical
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --maxprocesses 4 --dist worksteal
# Compiled code is kept, also where the environment says otherwise: tests start a hundred processes that import the same.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install run stop demo test test-slow test-long check format bench evaluate evaluate-answers questions clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(READY) ## Make the virtual environment with everything in it

$(READY): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

run: $(READY) ## Start the service with its embedded engine, load the examples, ask two questions; leaves it running
	@$(BIN)/hallmark demo --start --url $(URL) --data-dir $(DATA)

demo: $(READY) ## Ask the two questions of a running service again
	@$(BIN)/hallmark demo --url $(URL) --data-dir $(DATA)

stop: ## Stop the service that `make run` left running
	@test -f $(DATA)/worker.pid && kill $$(cat $(DATA)/worker.pid) 2>/dev/null || true
	@test -f $(DATA)/service.pid && kill $$(cat $(DATA)/service.pid) 2>/dev/null && echo "stopped" || echo "not running"
	@rm -f $(DATA)/service.pid $(DATA)/worker.pid

test: $(READY) ## Run the quick suite
	@$(PYTEST) -m "not slow and not long"

test-slow: $(READY) ## Run the tests that take longer, properties at length, and by themselves the tests that measure time
	@$(PYTEST) --timeout 240 --hypothesis-profile slow -m "(slow or hypothesis) and not alone and not long"
	@$(BIN)/python -m pytest -q --timeout 240 -m "slow and alone"

test-long: $(READY) ## Train a real model and take it the whole way to its promotion; ask every route in every odd way
	@$(BIN)/python -m pytest -q -m long

check: $(READY) ## Lint, check types, formatting and the import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY) ## Measure what a request costs beside calling the engine directly
	@$(BIN)/python -m tests.benchmarks.gateway

EVALUATION_DATA ?= ../shared/data
JUDGED := squad2_cs224n_dev cranfield cisi adi
evaluate: $(READY) ## Measure retrieval on the judged sets of EVALUATION_DATA and put the table into docs/retrieval.md
	@$(BIN)/hallmark-eval retrieval $(addprefix $(EVALUATION_DATA)/,$(JUDGED)) --settings \
		--references docs/retrieval-references.json --into docs/retrieval.md --at-least squad2_cs224n_dev:ndcg=.88 \
		--at-least cranfield:ndcg=.42 --at-least cisi:ndcg=.44

evaluate-answers: $(READY) ## Measure citations and abstention of the passages alone on EVALUATION_DATA
	@$(BIN)/hallmark-eval citations $(EVALUATION_DATA)/squad2_cs224n_dev --limit 400 \
		--at-least citation_precision=.95 --at-least citation_recall=.9 --at-least wrong_value_auc=.95
	@$(BIN)/hallmark-eval abstention $(EVALUATION_DATA)/squad2_cs224n_dev --limit 300 \
		--off-topic $(EVALUATION_DATA)/cranfield --off-topic $(EVALUATION_DATA)/cisi \
		--at-least off_topic_abstention=.85 --at-most false_abstention=.08

questions: $(READY) ## Ask the regression set through the whole service and print how it did
	@$(BIN)/python -m tests.benchmarks.questions

clean: ## Remove the virtual environment and caches, not your data
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
