# make reproduce   install if needed, then run the notebooks at their defaults
# make test        install if needed, then all tests
# make lab         install if needed, then JupyterLab
# make notebooks   execute the notebooks in place, so that they are stored with the outputs of the quick profile
# make figures     rewrite figures/ from quick grids (four hours on two cores; finished runs are kept)
# make paper       the papers' tables without Jupyter, on a GPU; MINUTES=25 begins nothing new after 25 minutes, and the next call goes on
# make book        the notebooks as a site to read, under build/book
# make student     student versions, solutions and an nbgrader course, under build/student (a quarter of an hour the first time)
# make attacks     ACC and ASR of every attack on CIFAR-10, quick profile (three to five hours on two cores)

# An active virtual or conda environment is used; otherwise .venv is made here.
ENV := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),.venv)
ifneq ($(words $(ENV)),1)
$(error the path of the active environment must not have a space, got $(ENV): deactivate it, and .venv is made here)
endif
PYTHON := $(ENV)/bin/python
INSTALLED := $(ENV)/.bdlib-installed

# The same bits on every x86-64 CPU with AVX2 (benchmarks/same_bits.py): one thread, instructions that all have, sums in one order.
# Not for `student`: students' own kernels read its models. Call runall.py or jupyterlab yourself to use all that your CPU has.
SAME_BITS := reproduce lab test-package test-notebooks notebooks figures attacks
$(SAME_BITS): export OMP_NUM_THREADS := 1
$(SAME_BITS): export ATEN_CPU_CAPABILITY := avx2
$(SAME_BITS): export ONEDNN_MAX_CPU_ISA := AVX2
$(SAME_BITS): export MKL_CBWR := COMPATIBLE

# Attacks on images of the target class alone poison 5%: 10% of ten equal classes would be all of that class.
CLEAN_LABEL := sig sig_rnp label_consistent
ATTACKS := badnets badnets_a2a badnets_grid badnets_4x4 badnets_corners l0_inv l2_inv trojan_3x3 trojan_square trojan_watermark trojannn \
	blended blended_picture signal signal_rnp signal_cbd lf wanet input_aware ssba lira adaptive_blend adaptive_patch

# Of the methods after training those that 06 also measures on three more attacks.
MOST := fine_tuning,fine_pruning,linf_pruning,nad,anp,i_bau,nc,clp,bnp,ep,awm,rnp,ft_sam

.PHONY: install reproduce test test-package test-notebooks lab notebooks figures attacks paper book student lint

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(ENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

reproduce: install
	$(PYTHON) runall.py

# Half of the time goes into the notebooks' own tests, half into the main job: side by side, a thread each, on two cores.
test: install
	$(MAKE) --jobs=2 --output-sync=line --no-print-directory test-package test-notebooks

test-package: install
	$(PYTHON) -m pytest tests

test-notebooks: install
	$(PYTHON) -m pytest notebooks

lab: install
	$(PYTHON) -m jupyterlab --ServerApp.root_dir=. notebooks/00_backdoors.ipynb

# The second command keeps the last state of a progress bar, not each.
notebooks: install
	$(PYTHON) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(PYTHON) -m nbconvert --to notebook --inplace --coalesce-streams notebooks/*.ipynb

figures: install
	$(PYTHON) runall.py --only 02_awm --budget 10 20 50 100 200 250 --seed 0 1 2 --out runs/figures/awm_budgets
	$(PYTHON) runall.py --only 02_awm --seed 0 1 2 --set ablations=True --out runs/figures/awm_ablations
	$(PYTHON) runall.py --only 01_linf_pruning --seed 1 2 --out runs/figures/linf_seeds
	$(PYTHON) runall.py --only 01_linf_pruning --seed 0 --set ablations=True --out runs/figures/linf_ablations
	$(PYTHON) runall.py --only 01_linf_pruning --attack blended --seed 0 --out runs/figures/linf_blended
	$(PYTHON) runall.py --only 05_ft_sam --seed 1 2 --out runs/figures/ft_sam_seeds
	$(PYTHON) runall.py --only 05_ft_sam --seed 0 --set ablations=True --out runs/figures/ft_sam_ablations
	$(PYTHON) runall.py --only 05_ft_sam --budget 50 500 --seed 0 --out runs/figures/ft_sam_budgets
	$(PYTHON) runall.py --only 03_rnp --seed 1 2 --out runs/figures/rnp_seeds
	$(PYTHON) runall.py --only 03_rnp --seed 0 --set ablations=True --out runs/figures/rnp_ablations
	$(PYTHON) runall.py --only 03_rnp --attack badnets --seed 0 1 2 --out runs/figures/rnp_badnets
	$(PYTHON) runall.py --only 03_rnp --budget 50 100 500 --seed 0 --out runs/figures/rnp_budgets
	$(PYTHON) runall.py --only 04_cbd --seed 1 2 --out runs/figures/cbd_seeds
	$(PYTHON) runall.py --only 04_cbd --seed 0 --set ablations=True --out runs/figures/cbd_ablations
	$(PYTHON) runall.py --only 04_cbd --poison-rate 0.01 0.1 0.2 0.5 --seed 0 --out runs/figures/cbd_poison_rates
	$(PYTHON) runall.py --only 04_cbd --attack blended badnets --seed 0 --out runs/figures/cbd_attacks
	$(PYTHON) runall.py --only 06_all_five --seed 0 1 2 --set reuse=False extras=control,oracle,detection,steps --out runs/figures/all_five
	$(PYTHON) runall.py --only 06_all_five --attack badnets trojan_square --seed 0 1 2 --set reuse=False extras=oracle,detection,steps \
		--out runs/figures/all_five_attacks
	$(PYTHON) runall.py --only 06_all_five --budget 10 50 5% --seed 0 --set reuse=False --out runs/figures/all_five_budgets
	$(PYTHON) runall.py --only 06_all_five --attack badnets_corners lf signal --seed 0 1 2 \
		--set reuse=False methods=$(MOST) --out runs/figures/all_five_more_attacks
	$(PYTHON) runall.py --only 06_all_five --attack blended badnets trojan_square badnets_corners lf signal --seed 0 \
		--set reuse=False methods=abl,cbd --out runs/figures/all_five_in_training
	$(PYTHON) -m bdlib.report runs/figures figures

attacks: install
	$(PYTHON) runall.py --only 00_backdoors --dataset cifar10 --out runs/attacks_cifar10/ten_percent --attack $(ATTACKS)
	$(PYTHON) runall.py --only 00_backdoors --dataset cifar10 --out runs/attacks_cifar10/five_percent --poison-rate 0.05 --attack $(CLEAN_LABEL)
	$(PYTHON) runall.py --only 00_backdoors --dataset cifar10 --set gallery=True --out runs/attacks_cifar10/gallery
	$(PYTHON) -m bdlib.report runs/attacks_cifar10 figures

# Out of time (3) is no failure: the rows that are there are shown.
paper: install
	$(PYTHON) -m bdlib.paper --minutes $(or $(MINUTES),0) || test $$? -eq 3
	$(PYTHON) -m bdlib.report runs/paper figures

book: install
	$(PYTHON) -m bdlib.book

student: install
	$(PYTHON) -m bdlib.coursework

lint: install
	$(PYTHON) -m ruff check .
