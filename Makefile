# Two commands for a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.11 or 3.12), VENV where its environment goes.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint docs wheel audit install

demo: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.demo --workdir=runs/demo

test: install
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Strictly: a broken link, anchor or docstring ends it. Open site/index.html.
docs: install
	$(VENV)/bin/python -m mkdocs build --strict --quiet

# What a user would install, tested in an environment that holds nothing else.
wheel: install
	.ci/wheel $(VENV)/bin/python

# An environment of its own: what audits is not what is audited.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit==2.10.1
	.ci/audit $(VENV)-audit/bin/pip-audit constraints.txt

install: $(VENV)/.installed-dev

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# The tests compare with PyTorch, which the package itself does not need.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@
