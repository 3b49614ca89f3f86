# make demo        set up and watch a video: stream 759 of seed 7, from python -m moss_jax.worlds.tabletop --seconds 30
# make serve       set up and start the live server: http://127.0.0.1:8765/
# make test        set up and run the tests, without the slow ones
# make test-slow   run the slow tests: the wheel in an environment of its own, the notebooks, several processes, Ray,
#                  the page in Chromium and Firefox, deploy/ in nginx and Prometheus, which are installed if they are
#                  missing and root may
# make lint        check style, formatting, layers and types

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test test-slow lint browsers servers

demo: .venv/installed
	$(BIN)/python serve.py --video assets/demo.mp4 --gin_file configs/demo.gin \
		--prompt "What do you see?" --prompt-at 4.12 \
		--prompt "Describe what is happening." --prompt-at 11.38 \
		--prompt "Tell me what is on the table." --prompt-at 14.51 \
		--prompt "What was the number before this one?" --prompt-at 19.2 \
		--prompt "Tell me when the ring is taken away." --prompt-at 23.6

serve: .venv/installed-serve
	$(BIN)/python serve.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Live servers and browsers have deadlines, which they might miss beside other tests.
test-slow: .venv/installed-slow browsers servers
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --ignore tests/serving
	$(BIN)/python -m pytest -m slow tests/serving

# Where one cannot be installed, the tests of the page in it are skipped, and say so.
browsers:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
		[ "$$(id -u)" = 0 ] && apt-get update --quiet && \
		apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core; } || \
		echo "there is no Chromium, and it cannot be installed: the page's tests in it are skipped"
	@command -v firefox-esr > /dev/null || command -v firefox > /dev/null || { \
		[ "$$(id -u)" = 0 ] && apt-get update --quiet && \
		apt-get install --quiet --yes --no-install-recommends firefox-esr fonts-dejavu-core; } || \
		echo "there is no Firefox, and it cannot be installed: the page's tests in it are skipped"

# Likewise for the tests of deploy/. Not where systemd runs, which would start them.
servers:
	@{ PATH=$$PATH:/usr/sbin; command -v nginx && command -v promtool; } > /dev/null || { \
		[ "$$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] && apt-get update --quiet && \
		apt-get install --quiet --yes --no-install-recommends nginx-light prometheus; } || \
		echo "there is no nginx or Prometheus, and it cannot be installed: the tests of deploy/ are skipped"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt pyproject.toml setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-serve: requirements.txt pyproject.toml setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	touch $@ .venv/installed

.venv/installed-dev: requirements.txt pyproject.toml setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed .venv/installed-serve

.venv/installed-slow: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,ray]'
	touch $@
