"""Combinations of packages and machines that are known to go wrong: one row each, with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True, slots=True)
class Facts:
    """What the conditions below are decided on."""

    versions: Mapping[str, str | None]
    cpu_flags: frozenset[str]
    torch_cuda: str | None  # the CUDA that torch is built for
    driver: bool  # NVIDIA's driver is here
    wanted_triton: str | None  # "==3.7.1", as torch asks for it

    def has(self, package: str, specifier: str = "") -> bool:
        """Whether a package is installed in such a version."""
        version = self.versions.get(package)
        return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)


@dataclass(frozen=True, slots=True)
class Problem:
    """`severity` is 'wrong' where results are silently wrong, 'broken' where something fails, 'slow'."""

    name: str
    severity: str
    applies: Callable[[Facts], bool]
    what: str
    advice: str
    source: str


PROBLEMS = (
    Problem(
        "two-onnxruntimes", "broken",
        lambda f: f.has("onnxruntime") and f.has("onnxruntime-gpu"),
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: the "
        "CUDA provider may be missing.",
        "Uninstall both, then install onnxruntime-gpu, which runs on the CPU too.",
        "https://github.com/microsoft/onnxruntime/issues/26996",
    ),
    Problem(
        "two-genais", "broken",
        lambda f: f.has("onnxruntime-genai") and f.has("onnxruntime-genai-cuda"),
        "onnxruntime-genai and onnxruntime-genai-cuda are both installed and overwrite each other's "
        "files.",
        "Uninstall both, then install onnxruntime-genai-cuda, which runs on the CPU too.",
        "https://github.com/microsoft/onnxruntime/issues/26996",
    ),
    Problem(
        "peft-convert-dora", "wrong",
        lambda f: f.has("peft", ">=0.19,<=0.21.2"),
        "PEFT's convert_to_lora drops the magnitudes of DoRA and the changed base of PiSSA without "
        "a word: outputs were off by 41 to 100 %.",
        "Do not use its output for those two.",
        "https://github.com/huggingface/peft/pull/2939; measured with 0.21.2",
    ),
    Problem(
        "peft-weighted-linear", "wrong",
        lambda f: f.has("peft", "<=0.21.2"),
        "PEFT's add_weighted_adapter averages A and B apart for linear, ties, dare and "
        "magnitude_prune: the cross terms made ΔW wrong by 97 %.",
        "Use combination_type='cat' or 'svd', which are right.",
        "https://github.com/huggingface/peft/issues/3004",
    ),
    Problem(
        "peft-weighted-variants", "wrong",
        lambda f: f.has("peft", "<=0.21.2"),
        "PEFT's add_weighted_adapter is silently wrong for DoRA, KaSA and lora_bias, even for one "
        "adapter of weight 1.",
        "Combine plain LoRA alone with it.",
        "https://github.com/huggingface/peft/issues/3761",
    ),
    Problem(
        "bitsandbytes-repacks", "wrong",
        lambda f: "avx512_bf16" in f.cpu_flags and f.has("bitsandbytes", ">=0.49") and f.has("peft"),
        "this CPU has AVX512-BF16, and there bitsandbytes repacks NF4 weights at the first forward: "
        "PEFT's merge_and_unload afterwards saves garbage.",
        "Merge with `lorasurgery merge`, which reads the files; or load, and merge before any forward.",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078; measured with 0.50.2",
    ),
    Problem(
        "transformers-wants-newer-peft", "broken",
        lambda f: f.has("transformers", ">=5.24") and f.has("peft", "<0.22"),
        "transformers' own load_adapter and add_adapter refuse this PEFT: they ask for 0.22.",
        "Load adapters with PeftModel.from_pretrained, or update peft.",
        "transformers 5.24, integrations/peft.py",
    ),
    Problem(
        "old-bitsandbytes", "broken",
        lambda f: f.has("transformers", ">=5") and f.has("bitsandbytes", "<0.46.1"),
        "transformers refuses this bitsandbytes and will not load NF4 models: it asks for 0.46.1.",
        "Update bitsandbytes.",
        "transformers 5.24, utils/import_utils.py",
    ),
    Problem(
        "vllm-drops-patterns", "wrong",
        lambda f: f.has("vllm"),
        "vLLM's adapter loader ignores rank_pattern and alpha_pattern: modules with an alpha of "
        "their own are scaled wrongly.",
        "Serve merged models, or adapters of one rank and one alpha.",
        "vllm/lora/peft_helper.py",
    ),
    Problem(
        "cuda-build-without-driver", "slow",
        lambda f: f.torch_cuda is not None and not f.driver,
        "torch is a CUDA build of several GB, but there is no NVIDIA driver: it runs on the CPU.",
        "Nothing is wrong; the CPU build is smaller (https://download.pytorch.org/whl/cpu).",
        "libcuda.so.1 cannot be loaded",
    ),
    Problem(
        "driver-without-cuda-build", "slow",
        lambda f: f.has("torch") and f.torch_cuda is None and f.driver,
        "there is an NVIDIA driver, but torch is built without CUDA: the GPU lies idle.",
        "Install the CUDA build of torch.",
        "torch.version.cuda",
    ),
    Problem(
        "another-triton", "broken",
        lambda f: f.wanted_triton is not None
        and f.has("triton")
        and not f.has("triton", f.wanted_triton),
        "triton is not the version that torch asks for: torch.compile and Triton kernels may fail.",
        "Install the one that `pip check` names.",
        "the requirements of the installed torch",
    ),
)  # fmt: skip


def known_problems(facts: Facts) -> list[Problem]:
    """Those that this environment has."""
    return [problem for problem in PROBLEMS if problem.applies(facts)]
