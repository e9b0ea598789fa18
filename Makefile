# Everything a newcomer needs is `make run` and `make test`; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup run test check kills format simulate bench lock

help:           ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:          ## make .venv; quick when nothing changed
	@tools/setup

run: setup      ## start the broker on its embedded default
	@.venv/bin/compute-broker serve

test: setup     ## every test
	@.venv/bin/python -m pytest -q -n 4 --dist loadfile $(ARGS)

check: setup    ## what must hold before a commit: format, lint, types, layers, tests
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m pytest -q -n 4 --dist loadfile $(ARGS)

kills: setup    ## kill the daemon 240 times at random moments; KILLS=… KILLS_SEED=… say otherwise
	KILLS=$${KILLS:-240} KILLS_SEED=$${KILLS_SEED:-$$(date +%s)} \
		.venv/bin/python -m pytest -q -s tests/acceptance/test_kills.py $(ARGS)

format: setup   ## format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

simulate: setup ## the long simulation: 10,000 days on all cores; the report goes to simulation.md
	.venv/bin/compute-broker simulate --seeds $(or $(SEEDS),10000) --report simulation.md $(ARGS)

bench: setup    ## measure against peers on this machine; WRITE=1 keeps the figures in bench/RESULTS.md
	.venv/bin/python -m bench.run $(if $(WRITE),--write) $(ARGS)

lock: setup     ## pin the newest versions that fit (needs uv)
	uv pip compile --quiet --universal --no-strip-extras --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --no-strip-extras --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --group dev pyproject.toml -o requirements-dev.lock
